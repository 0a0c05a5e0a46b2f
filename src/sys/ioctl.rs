//! Questions to block devices.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

mod raw {
    // The kernel's types are wrong by name and cannot be changed: it writes
    // 64 bits for BLKGETSIZE64 (include/uapi/linux/fs.h).
    nix::ioctl_read!(size, 0x12, 114, u64);
    nix::ioctl_read_bad!(sector_size, nix::request_code_none!(0x12, 104), libc::c_int);
    // include/uapi/linux/loop.h
    nix::ioctl_read_bad!(loop_status, 0x4C05, super::LoopInfo64);
}

/// Size in bytes of the block device `device` (`BLKGETSIZE64`).
///
/// # Errors
///
/// `ENOTTY` when it is no block device.
pub fn device_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: BLKGETSIZE64 writes one u64.
    unsafe { raw::size(device.as_raw_fd(), &raw mut size)? };
    Ok(size)
}

/// Bytes in a logical sector of the block device `device` (`BLKSSZGET`).
///
/// # Errors
///
/// `ENOTTY` when it is no block device.
pub fn sector_size(device: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: BLKSSZGET writes one int.
    unsafe { raw::sector_size(device.as_raw_fd(), &raw mut size)? };
    u32::try_from(size).map_err(io::Error::other)
}

/// What lies under a loop device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopStatus {
    /// Device number of the filesystem that the backing file is on.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// Where in the file the loop device begins, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0: to the end of the file.
    pub size_limit: u64,
    /// Whether what is read is what is in the file (no cryptoloop).
    pub transform: Transform,
}

/// What a loop device does to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// Nothing.
    None,
    /// Something (`lo_encrypt_type`, until Linux 5.15).
    Some,
}

/// What lies under the loop device `device` (`LOOP_GET_STATUS64`, loop(4)).
///
/// # Errors
///
/// `ENOTTY` when it is no loop device, `ENXIO` when nothing is attached.
pub fn loop_status(device: BorrowedFd<'_>) -> io::Result<LoopStatus> {
    let mut info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64, which `LoopInfo64` is.
    unsafe { raw::loop_status(device.as_raw_fd(), &raw mut info)? };
    Ok(LoopStatus {
        device: info.device,
        inode: info.inode,
        offset: info.offset,
        size_limit: info.size_limit,
        transform: if info.encrypt_type == 0 { Transform::None } else { Transform::Some },
    })
}

/// `struct loop_info64` of include/uapi/linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd, unix::fs::MetadataExt},
        process::Command,
    };

    use super::*;

    #[test]
    fn a_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        for error in [
            device_size(file.as_fd()).unwrap_err(),
            sector_size(file.as_fd()).unwrap_err(),
            loop_status(file.as_fd()).unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
    }

    #[test]
    #[ignore = "needs root and loop devices"]
    fn loop_devices_tell_size_sector_and_backing_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((1 << 20) + 4096 + 100).unwrap();
        // One at a time, as all tests: who loses the race for a free device
        // has the winner's open for a moment.
        let made = Command::new("flock")
            .args(["/dev/loop-control", "losetup"])
            .args(["--find", "--show", "--sector-size", "4096", "--offset", "4096"])
            .arg(file.path())
            .output()
            .unwrap();
        let path = String::from_utf8(made.stdout).unwrap();
        let device = File::open(path.trim()).unwrap();
        let facts = (device_size(device.as_fd()), sector_size(device.as_fd()));
        let status = loop_status(device.as_fd());
        Command::new("losetup").args(["--detach", path.trim()]).status().unwrap();
        assert_eq!((facts.0.unwrap(), facts.1.unwrap()), (1 << 20, 4096));
        let backing = file.as_file().metadata().unwrap();
        let expected = LoopStatus {
            device: backing.dev(),
            inode: backing.ino(),
            offset: 4096,
            size_limit: 0,
            transform: Transform::None,
        };
        assert_eq!(status.unwrap(), expected);
    }
}
