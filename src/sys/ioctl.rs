//! Questions to block devices, and to filesystems that share blocks.

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
    // include/uapi/linux/fs.h: FICLONE takes a descriptor, no address.
    nix::ioctl_write_int_bad!(clone, nix::request_code_write!(0x94, 9, size_of::<libc::c_int>()));
    nix::ioctl_write_ptr!(clone_range, 0x94, 13, super::FileCloneRange);
    // include/uapi/linux/fiemap.h; the kernel writes the counts back.
    nix::ioctl_readwrite!(extent_map, b'f', 11, super::FileExtentMap);
}

/// Makes `to` what `from` is, with the same blocks on the disk (`FICLONE`).
/// What is dirty of `from` is written back first; who writes to it waits.
///
/// # Errors
///
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL`: the filesystem does not share blocks, or
/// not of these files.
pub fn clone_file(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor and no memory.
    unsafe { raw::clone(to.as_raw_fd(), from.as_raw_fd())? };
    Ok(())
}

/// The same of the first `len` bytes, whole blocks (`FICLONERANGE`); 0: of
/// all.
///
/// # Errors
///
/// As [`clone_file`].
pub fn clone_start(to: BorrowedFd<'_>, from: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let from = i64::from(from.as_raw_fd());
    let range = FileCloneRange { from, from_offset: 0, len, to_offset: 0 };
    // SAFETY: FICLONERANGE reads one file_clone_range, which `FileCloneRange`
    // is.
    unsafe { raw::clone_range(to.as_raw_fd(), &raw const range)? };
    Ok(())
}

/// How many extents `file` has on its disk (`FS_IOC_FIEMAP`). What is dirty
/// of it is written back first.
///
/// # Errors
///
/// `EOPNOTSUPP` where the filesystem does not tell.
pub fn extents(file: BorrowedFd<'_>) -> io::Result<u32> {
    const WRITE_BACK_FIRST: u32 = 1;
    let mut map = FileExtentMap {
        start: 0,
        len: u64::MAX,
        flags: WRITE_BACK_FIRST,
        mapped: 0,
        room: 0,
        reserved: 0,
    };
    // SAFETY: FS_IOC_FIEMAP reads and writes one fiemap, which `FileExtentMap`
    // is; with no room for extents behind it, it only counts them.
    unsafe { raw::extent_map(file.as_raw_fd(), &raw mut map)? };
    Ok(map.mapped)
}

/// `struct file_clone_range` of include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Debug)]
struct FileCloneRange {
    from: i64,
    from_offset: u64,
    len: u64,
    to_offset: u64,
}

const _: () = assert!(size_of::<FileCloneRange>() == 32);

/// `struct fiemap` of include/uapi/linux/fiemap.h, without extents.
#[repr(C)]
#[derive(Debug)]
struct FileExtentMap {
    start: u64,
    len: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<FileExtentMap>() == 32);

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
