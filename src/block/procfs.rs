//! Pure readers of what the kernel prints.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// One line of a `mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Major and minor number of what `stat` shows for its files.
    pub(super) device: (u64, u64),
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// What is mounted: a path for filesystems that have a device.
    pub(super) source: PathBuf,
}

/// The mounts in a `/proc/PID/mountinfo`. Lines of another form are skipped.
pub(super) fn mounts(mountinfo: &[u8]) -> impl Iterator<Item = Mount> {
    // 36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/source rw,errors=continue
    mountinfo.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let device = std::str::from_utf8(fields.nth(2)?).ok()?;
        let (major, minor) = device.split_once(':')?;
        let point = unescape(fields.nth(1)?);
        // Optional fields end with a lone hyphen.
        fields.by_ref().find(|&field| field == b"-")?;
        let source = unescape(fields.nth(1)?);
        Some(Mount { device: (major.parse().ok()?, minor.parse().ok()?), point, source })
    })
}

/// The paths in `/proc/swaps`.
pub(super) fn swaps(swaps: &[u8]) -> impl Iterator<Item = PathBuf> {
    swaps
        .split(|&byte| byte == b'\n')
        .skip(1)
        .filter_map(|line| line.split(|&byte| matches!(byte, b' ' | b'\t')).next())
        .filter(|path| !path.is_empty())
        .map(unescape)
}

/// What an open file may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Reading alone.
    Read,
    /// Writing too.
    Write,
}

/// The access that a `/proc/PID/fdinfo/FD` tells. `None`: no flags in it, or
/// a descriptor that can do neither (`O_PATH`).
pub(super) fn access(fdinfo: &[u8]) -> Option<Access> {
    let line = std::str::from_utf8(fdinfo).ok()?.lines().find_map(|l| l.strip_prefix("flags:"))?;
    let flags = i32::from_str_radix(line.trim(), 8).ok()?;
    match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => None,
        libc::O_RDONLY => Some(Access::Read),
        _ => Some(Access::Write),
    }
}

/// Undoes the kernel's `\ooo` for blanks, newlines and backslashes.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mountinfo_is_read_with_and_without_optional_fields() {
        let text = b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            90 22 0:45 /@home /a\\040b\\134c rw shared:1 master:2 - btrfs /dev/vdb rw,subvol=/@home\n\
            broken line\n\
            91 22 7:3 / /mnt ro - xfs /dev/loop3 ro\n";
        let found: Vec<_> = mounts(text).collect();
        let mount = |device, point: &str, source: &str| Mount {
            device,
            point: point.into(),
            source: source.into(),
        };
        assert_eq!(
            found,
            [
                mount((254, 0), "/", "/dev/vda"),
                mount((0, 45), "/a b\\c", "/dev/vdb"),
                mount((7, 3), "/mnt", "/dev/loop3"),
            ]
        );
    }

    #[test]
    fn swaps_are_read_without_their_heading() {
        let text = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/sda2                               partition\t8388604\t\t0\t\t-2\n\
            /swap\\040file                           file\t\t1024\t\t0\t\t-3\n";
        let found: Vec<_> = swaps(text).collect();
        assert_eq!(found, [PathBuf::from("/dev/sda2"), PathBuf::from("/swap file")]);
    }

    #[test]
    fn access_is_in_the_flags() {
        let of =
            |flags: &str| access(format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t22\n").as_bytes());
        assert_eq!(of("0100000"), Some(Access::Read));
        assert_eq!(of("0100001"), Some(Access::Write));
        assert_eq!(of("02140002"), Some(Access::Write));
        assert_eq!(of("012000000"), None);
        assert_eq!(access(b"pos:\t0\n"), None);
        assert_eq!(access(b""), None);
    }

    proptest! {
        #[test]
        fn nothing_that_the_kernel_could_print_panics(text in prop::collection::vec(any::<u8>(), 0..200)) {
            mounts(&text).for_each(drop);
            swaps(&text).for_each(drop);
            let _ = access(&text);
            let _ = unescape(&text);
        }
    }
}
