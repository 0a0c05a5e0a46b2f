//! Who holds a volume: what the kernel says in `/proc` and `/sys`.
//!
//! The forms of the files are those of proc(5), `Documentation/ABI/` and
//! `Documentation/block/` in the kernel's source.

use std::{
    ffi::OsString,
    fmt, fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process,
};

use nix::{
    sys::stat::{major, makedev, minor},
    unistd::geteuid,
};

use super::procfs::{self, Access};
use crate::sys::stat::{Identity, identity};

/// What holds a volume. `Display` ends the sentence "the volume is …".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Holder {
    /// A filesystem on it, or on one of its partitions.
    Mounted { at: PathBuf },
    /// Swap space.
    Swap,
    /// A device made of it: device-mapper, MD, bcache.
    Stacked { device: String, name: Option<String> },
    /// A loop device over the file.
    Loop { device: String },
    /// A program.
    Process { name: String, pid: u32, access: Access },
    /// An earlier capture of this daemon, whose reads do not come back.
    Ourselves,
    /// QEMU's locks, by a program that cannot be seen.
    Locked,
    /// O_EXCL, by what cannot be seen.
    Claimed,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { at } => write!(f, "mounted at {}", at.display()),
            Self::Swap => f.write_str("used as swap"),
            Self::Stacked { device, name: None } => write!(f, "held by {device}"),
            Self::Stacked { device, name: Some(name) } => write!(f, "held by {device} ({name})"),
            Self::Loop { device } => write!(f, "attached to /dev/{device}"),
            Self::Process { name, pid, access: Access::Write } => {
                write!(f, "open for writing by {name} (pid {pid})")
            }
            Self::Process { name, pid, access: Access::Read } => {
                write!(f, "open in {name} (pid {pid})")
            }
            Self::Ourselves => f.write_str("still being read by imaged: it does not answer"),
            Self::Locked => f.write_str("locked by a QEMU that this host does not show"),
            Self::Claimed => f.write_str(
                "claimed by the kernel or by a program in another namespace (O_EXCL is refused)",
            ),
        }
    }
}

impl Holder {
    /// How to make it let go.
    pub(super) fn advice(&self) -> String {
        match self {
            Self::Mounted { at } => format!("run: umount {}", at.display()),
            Self::Swap => "run swapoff on it".into(),
            Self::Stacked { device, name } => {
                let device = name.as_ref().unwrap_or(device);
                format!("name {device} instead, or deactivate it")
            }
            Self::Loop { device } => {
                format!("name /dev/{device} instead, or run: losetup --detach /dev/{device}")
            }
            Self::Process { name, pid, .. } => {
                format!("shut the instance down or end {name} (pid {pid})")
            }
            Self::Ourselves => {
                "find out in the kernel's log (dmesg) why; it is let go when it answers".into()
            }
            Self::Locked | Self::Claimed => "stop what uses it, in its container or host".into(),
        }
    }
}

/// Which programs count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Openers {
    /// Those that can write.
    Writers,
    /// Those that can write, but for this process: the instance's own QEMU.
    WritersBut(u32),
    /// All.
    Everyone,
    /// All but this one.
    Others,
}

impl Openers {
    /// Whether programs count that cannot write.
    fn may_only_read(self) -> bool {
        matches!(self, Self::Everyone | Self::Others)
    }
}

/// Everything that is the volume, wholly or in part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Subject {
    /// The volume's own device.
    own: Option<u64>,
    /// Its device, that device's partitions, and the disk that it is a
    /// partition of.
    devices: Vec<u64>,
    /// Its file, or the file under its loop device, as (filesystem, inode).
    files: Vec<(u64, u64)>,
}

impl Subject {
    fn has(&self, found: Identity) -> bool {
        match found {
            Identity::BlockDevice(number) => self.devices.contains(&number),
            Identity::File { device, inode } => self.files.contains(&(device, inode)),
        }
    }

    fn is_at(&self, path: &Path) -> bool {
        path.is_absolute() && identity(path).is_ok_and(|found| self.has(found))
    }
}

/// Where the kernel says what it knows.
#[derive(Debug, Clone)]
pub(super) struct Host {
    proc: PathBuf,
    sys: PathBuf,
    hidden: Hidden,
}

/// The first process: systemd, or what a container has in its place.
const INIT: u32 = 1;

/// What a program means that does not show its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hidden {
    /// Nothing can be said of any volume.
    Refuses,
    /// A word in the log.
    Warns,
}

impl Default for Host {
    fn default() -> Self {
        let hidden = if geteuid().is_root() { Hidden::Refuses } else { Hidden::Warns };
        Self { proc: "/proc".into(), sys: "/sys".into(), hidden }
    }
}

impl Host {
    /// sysfs's directory of a block device.
    pub(super) fn device_dir(&self, number: u64) -> PathBuf {
        self.sys.join(format!("dev/block/{}:{}", major(number), minor(number)))
    }

    /// What belongs to a volume.
    ///
    /// # Errors
    ///
    /// sysfs cannot be read.
    pub(super) fn subject(&self, volume: Identity) -> io::Result<Subject> {
        let number = match volume {
            Identity::File { device, inode } => {
                return Ok(Subject { files: vec![(device, inode)], ..Subject::default() });
            }
            Identity::BlockDevice(number) => number,
        };
        let mut subject = Subject { own: Some(number), devices: vec![number], files: Vec::new() };
        let directory = fs::canonicalize(self.device_dir(number))?;
        for entry in fs::read_dir(&directory)? {
            let partition = entry?.path();
            if partition.join("partition").exists() {
                subject.devices.extend(read_number(&partition.join("dev")));
            }
        }
        if directory.join("partition").exists() {
            let disk = directory.parent().and_then(|disk| read_number(&disk.join("dev")));
            subject.devices.extend(disk);
        }
        for &device in &subject.devices {
            if let Some(path) = self.backing_file(device)
                && let Ok(Identity::File { device, inode }) = identity(&path)
            {
                subject.files.push((device, inode));
            }
        }
        Ok(subject)
    }

    /// The file under the loop device `number`, if it is one.
    pub(super) fn backing_file(&self, number: u64) -> Option<PathBuf> {
        read_path(&self.device_dir(number).join("loop/backing_file"))
    }

    /// What holds `subject`, the most telling first.
    ///
    /// # Errors
    ///
    /// `/proc` or `/sys` cannot be read: then nobody can say that it is free.
    pub(super) fn holder(&self, subject: &Subject, openers: Openers) -> io::Result<Option<Holder>> {
        if let Some(at) = self.mount_point(subject)? {
            return Ok(Some(Holder::Mounted { at }));
        }
        if self.is_swap(subject)? {
            return Ok(Some(Holder::Swap));
        }
        if let Some(holder) = self.stacked(subject)? {
            return Ok(Some(holder));
        }
        if let Some(holder) = self.other_loop(subject)? {
            return Ok(Some(holder));
        }
        self.opener(subject, openers)
    }

    fn mount_point(&self, subject: &Subject) -> io::Result<Option<PathBuf>> {
        // A service may have a mount namespace of its own; the first process
        // has the host's.
        let own = fs::read(self.proc.join("self/mountinfo"))?;
        let host = fs::read(self.proc.join("1/mountinfo")).unwrap_or_default();
        let mounts = procfs::mounts(&own).chain(procfs::mounts(&host));
        for mount in mounts {
            // btrfs shows a number of its own and the device as the source.
            let (major, minor) = mount.device;
            let number = makedev(major, minor);
            if subject.devices.contains(&number) || subject.is_at(&mount.source) {
                return Ok(Some(mount.point));
            }
        }
        Ok(None)
    }

    fn is_swap(&self, subject: &Subject) -> io::Result<bool> {
        let swaps = match fs::read(self.proc.join("swaps")) {
            Ok(swaps) => swaps,
            // A kernel without swap.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(procfs::swaps(&swaps).any(|path| subject.is_at(&path)))
    }

    fn stacked(&self, subject: &Subject) -> io::Result<Option<Holder>> {
        for &number in &subject.devices {
            let holders = names(&self.device_dir(number).join("holders"))?;
            if let Some(device) = holders.into_iter().next() {
                let name = read_line(&self.sys.join("block").join(&device).join("dm/name"));
                return Ok(Some(Holder::Stacked { device, name }));
            }
        }
        Ok(None)
    }

    /// A loop device over the same file, which can write to it.
    fn other_loop(&self, subject: &Subject) -> io::Result<Option<Holder>> {
        if subject.files.is_empty() {
            return Ok(None);
        }
        for device in names(&self.sys.join("block"))? {
            let directory = self.sys.join("block").join(&device);
            let Some(path) = read_path(&directory.join("loop/backing_file")) else { continue };
            let number = read_number(&directory.join("dev"));
            let read_only = read_line(&directory.join("ro")).is_some_and(|ro| ro == "1");
            let same = number.is_some_and(|number| subject.devices.contains(&number));
            if !same && !read_only && subject.is_at(&path) {
                return Ok(Some(Holder::Loop { device }));
            }
        }
        Ok(None)
    }

    /// A program that has the subject open. This one is the last to be
    /// asked, and only where the subject could not be opened anew.
    ///
    /// A program that does not show its files may be the one. imaged is root
    /// and may look at all of them; where it may not (no CAP_SYS_PTRACE, a
    /// security module) nobody can say that the volume is free. Without root
    /// every other user's programs are hidden: such an imaged is for tests,
    /// reaches no device, and only warns. The first process opens no volumes,
    /// and in some containers nobody may look at it: it does not count.
    fn opener(&self, subject: &Subject, openers: Openers) -> io::Result<Option<Holder>> {
        let mut hidden = 0_u32;
        let mut pids: Vec<u32> =
            names(&self.proc)?.iter().filter_map(|name| name.parse().ok()).collect();
        pids.retain(|pid| *pid != process::id() && openers != Openers::WritersBut(*pid));
        if openers == Openers::Everyone {
            pids.push(process::id());
        }
        for pid in pids {
            let process = self.proc.join(pid.to_string());
            // The kernel also says "denied" of a link whose process ends while
            // it is followed: a second look finds that one gone.
            let look = || opened_by(&process, subject, openers);
            match look().or_else(|denied| if is_hidden(&denied) { look() } else { Err(denied) }) {
                Ok(None) => {}
                Ok(Some(_)) if pid == process::id() => return Ok(Some(Holder::Ourselves)),
                Ok(Some(access)) => {
                    let name = read_line(&process.join("comm")).unwrap_or_else(|| "?".into());
                    return Ok(Some(Holder::Process { name, pid, access }));
                }
                Err(error) if is_hidden(&error) => hidden += u32::from(pid != INIT),
                // Processes go while one looks.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if hidden > 0 {
            let sentence = format!("{hidden} programs do not show which files they have open");
            match self.hidden {
                Hidden::Refuses => {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, sentence));
                }
                Hidden::Warns => tracing::warn!("{sentence}: imaged needs CAP_SYS_PTRACE"),
            }
        }
        Ok(None)
    }
}

/// What the process at `process` may do to the subject, if it has it open in
/// a way that counts.
fn opened_by(process: &Path, subject: &Subject, openers: Openers) -> io::Result<Option<Access>> {
    for descriptor in names(&process.join("fd"))? {
        // Descriptors go while one looks. Names may be seen by whoever may
        // read every file, what they lead to only by who may trace.
        match identity(&process.join("fd").join(&descriptor)) {
            Ok(found) if subject.has(found) => {}
            Ok(_) => continue,
            Err(error) if is_hidden(&error) => return Err(error),
            // What is no volume, or is gone.
            Err(_) => continue,
        }
        let info = match fs::read(process.join("fdinfo").join(&descriptor)) {
            Err(error) if is_gone(&error) => continue,
            read => read?,
        };
        match procfs::access(&info) {
            Some(access) if access == Access::Write || openers.may_only_read() => {
                return Ok(Some(access));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// Whether this process may not look.
fn is_hidden(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Whether a process or descriptor ended meanwhile.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Names in a directory, sorted; none when it is not there.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    match fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    names.sort_unstable();
    Ok(names)
}

fn read_line(path: &Path) -> Option<String> {
    Some(String::from_utf8_lossy(&fs::read(path).ok()?).trim_end_matches('\n').to_owned())
}

fn read_path(path: &Path) -> Option<PathBuf> {
    let mut bytes = fs::read(path).ok()?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Some(PathBuf::from(OsString::from_vec(bytes)))
}

/// A device number as sysfs writes it: `8:1`.
fn read_number(path: &Path) -> Option<u64> {
    let line = read_line(path)?;
    let (major, minor) = line.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::unix::fs::{MetadataExt, symlink},
        process::{Command, Stdio},
        time::Duration,
    };

    use super::*;

    /// A kernel with a disk 8:0 in two partitions and a volume group on the
    /// second.
    struct Kernel {
        root: tempfile::TempDir,
        host: Host,
    }

    impl Kernel {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let host = Host {
                proc: root.path().join("proc"),
                sys: root.path().join("sys"),
                hidden: Hidden::Refuses,
            };
            let kernel = Self { root, host };
            kernel.write("proc/self/mountinfo", "");
            kernel.write("proc/swaps", "Filename\n");
            for (name, number, partition) in [
                ("sda", "8:0", None),
                ("sda/sda1", "8:1", Some("1")),
                ("sda/sda2", "8:2", Some("2")),
            ] {
                kernel.write(&format!("sys/devices/{name}/dev"), &format!("{number}\n"));
                fs::create_dir_all(kernel.root.path().join(format!("sys/devices/{name}/holders")))
                    .unwrap();
                if let Some(partition) = partition {
                    kernel.write(&format!("sys/devices/{name}/partition"), partition);
                }
                fs::create_dir_all(kernel.root.path().join("sys/dev/block")).unwrap();
                symlink(
                    format!("../../devices/{name}"),
                    kernel.root.path().join("sys/dev/block").join(number),
                )
                .unwrap();
            }
            kernel
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn holder(&self, minor: u64) -> Option<String> {
            let subject = self.host.subject(Identity::BlockDevice(makedev(8, minor))).unwrap();
            let holder = self.host.holder(&subject, Openers::Writers).unwrap();
            holder.map(|holder| format!("{holder}; {}", holder.advice()))
        }
    }

    #[test]
    fn a_disk_includes_its_partitions_and_a_partition_its_disk() {
        let kernel = Kernel::new();
        let devices = |minor| {
            let mut devices =
                kernel.host.subject(Identity::BlockDevice(makedev(8, minor))).unwrap().devices;
            devices.sort_unstable();
            devices
        };
        assert_eq!(devices(0), [makedev(8, 0), makedev(8, 1), makedev(8, 2)]);
        assert_eq!(devices(1), [makedev(8, 0), makedev(8, 1)]);
        assert_eq!(kernel.holder(0), None);
    }

    #[test]
    fn a_device_of_the_kernel_is_named_with_its_volume() {
        let kernel = Kernel::new();
        kernel.write("sys/devices/sda/sda2/holders/dm-3/x", "");
        assert_eq!(kernel.holder(0).unwrap(), "held by dm-3; name dm-3 instead, or deactivate it");
        kernel.write("sys/block/dm-3/dm/name", "vg-root\n");
        insta::assert_snapshot!(kernel.holder(0).unwrap(), @"held by dm-3 (vg-root); name vg-root instead, or deactivate it");
        assert_eq!(kernel.holder(1), None, "the neighbour of a held partition is free");
        kernel.write("sys/devices/sda/holders/dm-0/x", "");
        assert_eq!(kernel.holder(1).unwrap(), "held by dm-0; name dm-0 instead, or deactivate it");
    }

    #[test]
    fn a_mount_is_found_by_number_in_either_namespace() {
        let kernel = Kernel::new();
        kernel.write("proc/1/mountinfo", "22 1 8:2 / /srv/a\\040b rw - ext4 /dev/sda2 rw\n");
        insta::assert_snapshot!(kernel.holder(2).unwrap(), @"mounted at /srv/a b; run: umount /srv/a b");
        assert!(kernel.holder(0).is_some());
        assert_eq!(kernel.holder(1), None);
    }

    #[test]
    fn a_file_used_as_swap_or_by_a_loop_device_is_held() {
        let kernel = Kernel::new();
        let file = kernel.root.path().join("volume");
        fs::write(&file, "x").unwrap();
        let subject = kernel.host.subject(identity(&file).unwrap()).unwrap();
        let holder = || kernel.host.holder(&subject, Openers::Writers).unwrap();
        kernel.write("sys/block/loop7/loop/backing_file", &format!("{}\n", file.display()));
        kernel.write("sys/block/loop7/dev", "7:7\n");
        kernel.write("sys/block/loop7/ro", "1\n");
        assert_eq!(holder(), None, "a loop device that cannot write");
        kernel.write("sys/block/loop7/ro", "0\n");
        assert_eq!(holder().unwrap().to_string(), "attached to /dev/loop7");
        kernel.write("proc/swaps", &format!("Filename\n{} file 1 0 -2\n", file.display()));
        assert_eq!(holder().unwrap(), Holder::Swap);
    }

    #[test]
    fn a_kernel_that_tells_nothing_is_an_error() {
        let kernel = Kernel::new();
        fs::remove_file(kernel.root.path().join("proc/self/mountinfo")).unwrap();
        let subject = kernel.host.subject(Identity::BlockDevice(makedev(8, 0))).unwrap();
        assert!(kernel.host.holder(&subject, Openers::Writers).is_err());
        assert!(kernel.host.subject(Identity::BlockDevice(makedev(9, 9))).is_err());
    }

    #[test]
    fn only_a_program_that_can_write_holds_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let subject =
            Subject { files: vec![(metadata.dev(), metadata.ino())], ..Subject::default() };
        // Until it is as `expected`, for two seconds: a program that another
        // test just started has what this one had open for a moment.
        let find = |stdin: Stdio, openers, expected: &dyn Fn(&str, u32) -> bool| {
            let mut sleep = Command::new("sleep").arg("30").stdin(stdin).spawn().unwrap();
            let pid = sleep.id();
            let mut found = String::new();
            let settled = (0..40).any(|_| {
                let holder = Host::default().opener(&subject, openers).unwrap();
                found = holder.map(|holder| holder.to_string()).unwrap_or_default();
                let settled = expected(&found, pid);
                std::thread::sleep(Duration::from_millis(if settled { 0 } else { 50 }));
                settled
            });
            sleep.kill().unwrap();
            sleep.wait().unwrap();
            assert!(settled, "{found:?} with pid {pid}");
        };
        let read = || Stdio::from(File::open(file.path()).unwrap());
        let write = Stdio::from(File::options().append(true).open(file.path()).unwrap());

        find(read(), Openers::Writers, &|found, _| found.is_empty());
        find(read(), Openers::Everyone, &|found, pid| found.ends_with(&format!("(pid {pid})")));
        find(write, Openers::Writers, &|found, pid| {
            found.starts_with("open for writing by ") && found.ends_with(&format!("(pid {pid})"))
        });
    }

    /// Not a test of its own: what the test below runs without a capability.
    #[test]
    #[ignore = "run by the test below"]
    fn root_looks_without_a_capability() {
        if std::env::var_os("IMAGED_TEST_LOOK").is_none() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let subject = Host::default().subject(identity(file.path()).unwrap()).unwrap();
        let look = |hidden| {
            let host = Host { hidden, ..Host::default() };
            host.holder(&subject, Openers::Writers).map_err(|error| error.to_string())
        };
        println!("as root: {:?}, else: {:?}", look(Host::default().hidden), look(Hidden::Warns));
    }

    #[test]
    #[ignore = "needs root, to look without a capability"]
    fn root_programs_that_do_not_show_their_files_refuse_every_volume() {
        let look = |capabilities: &str| {
            let output = Command::new("setpriv")
                .args(["--bounding-set", capabilities, "--"])
                .arg(std::env::current_exe().unwrap())
                .args(["--ignored", "--nocapture", "--exact"])
                .arg("block::holder::tests::root_looks_without_a_capability")
                .env("IMAGED_TEST_LOOK", "1")
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find(|line| line.starts_with("as root")).unwrap_or(&text).to_owned()
        };
        assert_eq!(look("+all"), "as root: Ok(None), else: Ok(None)");
        let hidden = look("-sys_ptrace");
        assert!(hidden.starts_with("as root: Err(\""), "{hidden}");
        assert!(hidden.contains("programs do not show which files they have open"), "{hidden}");
        assert!(hidden.ends_with("else: Ok(None)"), "{hidden}");
    }
}
