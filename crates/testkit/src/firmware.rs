//! What a guest writes, without a guest: the firmware's own drivers write to every kind of disk, and are up at once.
//!
//! SeaBIOS drives virtio, SCSI, IDE, AHCI, NVMe, USB, SD and floppy devices by their registers, as a guest does, so it
//! shows what QEMU's device makes of a write. `qemu-io` writes into the block layer itself and shows nothing of that.

use anyhow::{Context as _, Result, ensure};
use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Where a sector is written on a hard disk, and on a floppy.
pub const WRITTEN_AT: (usize, usize) = (64 * SECTOR, 8 * SECTOR);
const SECTOR: usize = 512;
const ANSWER: Duration = Duration::from_secs(60);

/// `firmware.s`, assembled.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c,
    0xfb, 0xfc, 0xb0, 0x2e, 0xe8, 0x4f, 0x00, 0xba, 0xfd, 0x03, 0xec, 0xa8,
    0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, 0xbf, 0x00, 0x80, 0xb9, 0x00,
    0x02, 0xf3, 0xaa, 0xb2, 0x80, 0x88, 0xd0, 0x2c, 0x80, 0x3a, 0x06, 0x75,
    0x04, 0x73, 0x10, 0x52, 0xbe, 0x74, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13,
    0xe8, 0x1d, 0x00, 0x5a, 0x42, 0xeb, 0xe6, 0xf6, 0x06, 0x10, 0x04, 0x01,
    0x74, 0xc4, 0xb8, 0x01, 0x03, 0xbb, 0x00, 0x80, 0xb9, 0x09, 0x00, 0x31,
    0xd2, 0xcd, 0x13, 0xe8, 0x02, 0x00, 0xeb, 0xb2, 0xb0, 0x2d, 0x72, 0x02,
    0xb0, 0x2b, 0x88, 0xc4, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb,
    0x88, 0xe0, 0xba, 0xf8, 0x03, 0xee, 0xc3, 0x90, 0x10, 0x00, 0x01, 0x00,
    0x00, 0x80, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00
];

/// The firmware of a [`BareMachine`](crate::BareMachine), at our command.
#[derive(Debug)]
pub struct Firmware {
    serial: UnixStream,
}

impl Firmware {
    /// The first sector of the disk that it boots from: one with `bootindex=1`.
    pub fn boot_sector() -> Vec<u8> {
        let mut sector = PROGRAM.to_vec();
        sector.resize(SECTOR - 2, 0);
        sector.extend([0x55, 0xaa]);
        sector
    }

    /// Arguments for QEMU: the serial port that it listens to.
    pub fn arguments(work: &Path) -> [String; 4] {
        let socket = format!("socket,id=firmware,path={},server=on,wait=off", work.join("serial").display());
        ["-chardev".into(), socket, "-device".into(), "isa-serial,chardev=firmware".into()]
    }

    /// Waits until it has booted.
    ///
    /// # Errors
    /// If it does not.
    pub fn await_boot(work: &Path) -> Result<Self> {
        let serial = UnixStream::connect(work.join("serial"))?;
        serial.set_read_timeout(Some(ANSWER))?;
        let mut firmware = Self { serial };
        firmware.answer().context("the firmware does not boot")?;
        Ok(firmware)
    }

    /// Writes a sector full of `byte` to each of its disks, and says how many there are.
    ///
    /// # Errors
    /// If one of them answers with an error.
    pub fn write(&mut self, byte: u8) -> Result<usize> {
        self.serial.write_all(&[byte])?;
        let said = self.answer()?;
        ensure!(said.bytes().all(|sign| sign == b'+'), "the firmware's disks answer {said}");
        Ok(said.len())
    }

    fn answer(&mut self) -> Result<String> {
        let mut said = String::new();
        loop {
            let mut sign = [0];
            self.serial.read_exact(&mut sign)?;
            match sign[0] {
                b'.' => return Ok(said),
                sign => said.push(sign.into()),
            }
        }
    }
}

/// What [`Firmware::write`] put into an image.
pub fn written(image: &[u8], floppy: bool) -> &[u8] {
    let at = if floppy { WRITTEN_AT.1 } else { WRITTEN_AT.0 };
    image.get(at..at + SECTOR).unwrap_or_default()
}
