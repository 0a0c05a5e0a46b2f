//! Open files: closing what nobody should have, handing others to a process.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// Descriptors that one message may carry: below the kernel's 253
/// (`SCM_MAX_FD`).
pub const MAX_PASSED: usize = 64;

/// Closes every descriptor from `first` on (close_range(2), Linux 5.9; before
/// that by `/proc/self/fd`). To be called before the process owns any: what
/// is closed here may not be used afterwards.
///
/// # Errors
///
/// What the kernel says.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: passes three integers. The caller promises that nothing in this
    // process owns a descriptor from `first` on.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) } == 0 {
        return Ok(());
    }
    match Errno::last() {
        Errno::ENOSYS => {}
        error => return Err(error.into()),
    }
    let open = fs::read_dir("/proc/self/fd")?;
    let open: Vec<RawFd> =
        open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| i64::from(*fd) >= i64::from(first)) {
        // The directory's own is closed already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// Sends `bytes` and duplicates of `descriptors`, at most [`MAX_PASSED`].
/// All bytes or an error: short messages only.
///
/// # Errors
///
/// What the kernel says.
pub fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[impl AsFd]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage] = if raw.is_empty() { &[] } else { &rights };
    let bytes = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == bytes[0].len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what one [`send`] sent, and closes it on exec: the number of
/// bytes, 0 at the end, and the descriptors.
///
/// # Errors
///
/// What the kernel says; `InvalidData` when descriptors were lost.
pub fn receive(socket: &UnixStream, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_PASSED]);
    let mut bytes = [IoSliceMut::new(buf)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut bytes, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(passed) = control {
            // SAFETY: the kernel has just made these for us, and nobody else
            // in this process knows them.
            descriptors.extend(passed.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        send(&here, b"job", &[far]).unwrap();
        let mut buf = [0; 16];
        let (len, mut passed) = receive(&there, &mut buf).unwrap();
        assert_eq!((&buf[..len], passed.len()), (&b"job"[..], 1));
        near.write_all(b"!").unwrap();
        let mut far = UnixStream::from(passed.remove(0));
        far.read_exact(&mut buf[..1]).unwrap();
        assert_eq!(buf[0], b'!');
        drop(here);
        assert_eq!(receive(&there, &mut buf).unwrap().0, 0);
    }
}
