//! Holds one instant of all disks of a running VM while the guest writes on
