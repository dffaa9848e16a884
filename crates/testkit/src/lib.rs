//! Real guests, scripted and hostile peers, and the oracle that decides what is correct
