//! Asynchronous client for the QEMU Machine Protocol and the guest agent
