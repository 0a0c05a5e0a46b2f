//! One daemon per state directory and per socket.
//!
//! Both are claimed with a lock that the kernel drops with the process, so
//! nothing has to be cleaned up after a crash: whoever holds the socket's lock
//! may replace a socket that a dead daemon left. Lock files are never removed,
//! because whoever waits for a removed one would lock nothing.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, chown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
    unistd::{Group, geteuid},
};

use crate::{
    config::{Config, DEFAULT_GROUP},
    error::{Context, Error, Reason, Result},
    rpc::Access,
};

/// The journal may hold what an undo needs and others must not see.
const STATE_MODE: u32 = 0o700;
/// Clients must be able to reach the socket.
const RUNTIME_MODE: u32 = 0o755;
/// The daemon's user and the socket's group.
const SHARED_MODE: u32 = 0o660;
/// The daemon's user alone, where there is no such group: a process of the
/// group that the daemon happens to run in, `root`, is nobody special.
const PRIVATE_MODE: u32 = 0o600;

/// A state directory and a socket that are this process's alone. Dropping it
/// removes the socket.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    listener: UnixListener,
    group: SocketGroup,
    _state: File,
    _socket: File,
}

/// Whose members may call.
#[derive(Debug)]
enum SocketGroup {
    Members(u32),
    /// Nobody but root and the daemon's user, and why.
    Nobody(Error),
}

impl Claim {
    /// Claims what `config` names; missing directories are made. Blocks.
    ///
    /// # Errors
    ///
    /// `DAEMON_RUNNING`; `INVALID_CONFIGURATION` for a group that does not
    /// exist or a path that cannot be used.
    pub fn new(config: &Config) -> Result<Self> {
        let state_dir = &config.state_dir;
        make_dir(state_dir, STATE_MODE)?;
        let used = format!("the state directory {}", state_dir.display());
        let state = lock(&state_dir.join("lock"), &used)?;

        let path = config.socket.clone();
        if let Some(dir) = path.parent() {
            make_dir(dir, RUNTIME_MODE)?;
        }
        let used = format!("the socket {}", path.display());
        let socket = lock(&path.with_added_extension("lock"), &used)?;
        refuse_if_served(&path)?;
        let (listener, group) = bind(&path, config.socket_group.as_deref(), DEFAULT_GROUP)?;
        Ok(Self { path, listener, group, _state: state, _socket: socket })
    }

    /// The listening socket, not blocking.
    pub fn listener(&self) -> Result<UnixListener> {
        self.listener
            .set_nonblocking(true)
            .and_then(|()| self.listener.try_clone())
            .context(Reason::Internal, || "the socket cannot be shared")
    }

    /// Who may call.
    pub fn access(&self) -> Access {
        let group = match self.group {
            SocketGroup::Members(gid) => Some(gid),
            SocketGroup::Nobody(_) => None,
        };
        Access { owner: geteuid().as_raw(), group }
    }

    /// Why no group may call.
    pub fn problem(&self) -> Option<&Error> {
        match &self.group {
            SocketGroup::Members(_) => None,
            SocketGroup::Nobody(problem) => Some(problem),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Ours: the lock is still held.
        if let Err(cause) = fs::remove_file(&self.path) {
            tracing::warn!("the socket {} stays behind: {cause}", self.path.display());
        }
    }
}

fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .context(Reason::InvalidConfiguration, || {
            format!("the directory {} cannot be made", dir.display())
        })
}

/// Locks the file `path`, which names the process that holds it.
fn lock(path: &Path, used: &str) -> Result<File> {
    let unusable = || format!("the lock {} cannot be taken", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .context(Reason::InvalidConfiguration, unusable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // It may be writing its name just now.
            let _ = file.read_to_string(&mut holder);
            return Err(running(used, holder.trim().parse().ok()));
        }
        Err(TryLockError::Error(cause)) => {
            return Err(cause).context(Reason::InvalidConfiguration, unusable);
        }
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .context(Reason::InvalidConfiguration, unusable)?;
    Ok(file)
}

fn running(used: &str, pid: Option<u32>) -> Error {
    let who = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
    Error::new(Reason::DaemonRunning, format!("{used} is in use by another imaged{who}"))
        .advice("stop that one, or give this one its own socket and state_dir")
}

/// Refuses a path behind which somebody listens, who holds no lock of ours,
/// and one that is no socket.
fn refuse_if_served(path: &Path) -> Result<()> {
    let unusable = || format!("the socket {} cannot be made", path.display());
    match fs::symlink_metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(cause).context(Reason::InvalidConfiguration, unusable),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(Error::new(Reason::InvalidConfiguration, unusable())
                .because("something else than a socket is there")
                .advice("move it away, or set another socket"));
        }
        Ok(_) => {}
    }
    let address = UnixAddr::new(path).context(Reason::InvalidConfiguration, unusable)?;
    // Not blocking: a listener whose backlog is full must not hold us up.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .context(Reason::Internal, unusable)?;
    match connect(client.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(()),
        Ok(()) | Err(Errno::EAGAIN) => {
            Err(running(&format!("the socket {}", path.display()), None))
        }
        Err(cause) => Err(cause).context(Reason::InvalidConfiguration, unusable),
    }
}

/// Binds beside `path` and moves the socket there when its mode and group are
/// right, which also replaces a dead one at once.
fn bind(path: &Path, group: Option<&str>, default: &str) -> Result<(UnixListener, SocketGroup)> {
    let unusable = || format!("the socket {} cannot be made", path.display());
    let fresh = path.with_added_extension("new");
    match fs::remove_file(&fresh) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(cause).context(Reason::InvalidConfiguration, unusable);
        }
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).context(Reason::InvalidConfiguration, unusable)?;
    let set_mode = |mode| {
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))
            .context(Reason::InvalidConfiguration, unusable)
    };
    set_mode(PRIVATE_MODE)?;
    let group = give_to_group(&fresh, group, default)?;
    if matches!(group, SocketGroup::Members(_)) {
        set_mode(SHARED_MODE)?;
    }
    fs::rename(&fresh, path).context(Reason::InvalidConfiguration, unusable)?;
    Ok((listener, group))
}

/// Gives `socket` to the group that was named, which must exist: a typing
/// error must not lock its members out. Where none was named and there is no
/// group `default`, the daemon serves root and says so, because a first start
/// should not fail for that.
fn give_to_group(socket: &Path, named: Option<&str>, default: &str) -> Result<SocketGroup> {
    let name = named.unwrap_or(default);
    let failed = || format!("the socket cannot be given to the group {name:?}");
    let given =
        match Group::from_name(name) {
            Ok(Some(group)) => {
                let gid = group.gid.as_raw();
                chown(socket, None, Some(gid))
                    .context(Reason::InvalidConfiguration, failed)
                    .map(|()| gid)
            }
            Ok(None) => Err(Error::new(Reason::InvalidConfiguration, failed())
                .because("there is no such group")),
            Err(cause) => Err(cause).context(Reason::InvalidConfiguration, failed),
        };
    match given {
        Ok(gid) => Ok(SocketGroup::Members(gid)),
        Err(error) if named.is_some() => {
            Err(error.advice("make the group, or set another socket_group"))
        }
        Err(error) => Ok(SocketGroup::Nobody(error.advice(format!(
            "only root may call; make the group with \"groupadd --system {name}\", add those who \
             may call, and restart imaged"
        )))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::MetadataExt, net::UnixStream};

    use nix::unistd::getegid;

    use super::*;

    fn config(dir: &Path) -> Config {
        Config {
            socket: dir.join("run/imaged.sock"),
            state_dir: dir.join("state"),
            // A group that every test's user may give files to: its own.
            socket_group: Group::from_gid(getegid()).unwrap().map(|group| group.name),
            ..Config::default()
        }
    }

    fn refused(config: &Config, dir: &Path) -> String {
        let report = Claim::new(config).unwrap_err().report();
        let pid = std::process::id().to_string();
        report.replace(dir.to_str().unwrap(), "DIR").replace(&pid, "PID")
    }

    #[test]
    fn directories_and_socket_have_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::new(&config(dir.path())).unwrap();
        let mode = |path: &str| dir.path().join(path).metadata().unwrap().mode() & 0o777;
        assert_eq!(mode("state"), 0o700);
        assert_eq!(mode("run"), 0o755);
        assert_eq!(mode("run/imaged.sock"), 0o660);
        let socket = dir.path().join("run/imaged.sock").metadata().unwrap();
        assert_eq!(Some(socket.gid()), claim.access().group);
        drop(claim);
        assert!(!dir.path().join("run/imaged.sock").exists());
    }

    #[test]
    fn a_second_daemon_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let first = config(dir.path());
        let _claim = Claim::new(&first).unwrap();
        let same_state = Config { socket: dir.path().join("other.sock"), ..first.clone() };
        insta::assert_snapshot!(refused(&same_state, dir.path()), @"
        the state directory DIR/state is in use by another imaged (pid PID)
          help: stop that one, or give this one its own socket and state_dir
        ");
        let same_socket = Config { state_dir: dir.path().join("other"), ..first };
        insta::assert_snapshot!(refused(&same_socket, dir.path()), @"
        the socket DIR/run/imaged.sock is in use by another imaged (pid PID)
          help: stop that one, or give this one its own socket and state_dir
        ");
    }

    #[test]
    fn a_dead_daemons_socket_is_taken_over_and_a_strangers_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::create_dir(dir.path().join("run")).unwrap();
        let listener = UnixListener::bind(&config.socket).unwrap();
        insta::assert_snapshot!(refused(&config, dir.path()), @"
        the socket DIR/run/imaged.sock is in use by another imaged
          help: stop that one, or give this one its own socket and state_dir
        ");
        drop(listener);
        assert!(config.socket.exists());
        let _claim = Claim::new(&config).unwrap();
        UnixStream::connect(&config.socket).unwrap();
    }

    #[test]
    fn a_file_in_the_sockets_place_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(&config.socket, "precious").unwrap();
        insta::assert_snapshot!(refused(&config, dir.path()), @"
        the socket DIR/run/imaged.sock cannot be made
          0: something else than a socket is there
          help: move it away, or set another socket
        ");
        assert_eq!(fs::read_to_string(&config.socket).unwrap(), "precious");
    }

    #[test]
    fn without_a_group_the_socket_is_the_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imaged.sock");
        let (_listener, group) = bind(&path, None, "no-such-group").unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let SocketGroup::Nobody(problem) = group else { panic!("{group:?}") };
        insta::assert_snapshot!(problem.report(), @r#"
        the socket cannot be given to the group "no-such-group"
          0: there is no such group
          help: only root may call; make the group with "groupadd --system no-such-group", add those who may call, and restart imaged
        "#);
    }

    #[test]
    fn a_group_that_was_named_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { socket_group: Some("no-such-group".into()), ..config(dir.path()) };
        insta::assert_snapshot!(refused(&config, dir.path()), @r#"
        the socket cannot be given to the group "no-such-group"
          0: there is no such group
          help: make the group, or set another socket_group
        "#);
    }
}
