//! A file that has its name only when it is whole.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    unistd::linkat,
};

/// Who may read it: an image has all that its guest had, passwords too.
const MODE: u32 = 0o600;

/// A file without a name; where the filesystem has no such files, with a
/// temporary one that is removed on the way out.
#[derive(Debug)]
pub(super) struct NewFile {
    file: File,
    path: PathBuf,
    temporary: Option<PathBuf>,
    replaces: Replaces,
}

/// What may have its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaces {
    Nothing,
    File,
}

impl NewFile {
    /// Begins the file that will be `path`.
    pub(super) fn create(path: &Path, replaces: Replaces) -> io::Result<Self> {
        if path.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no name of a file"));
        }
        match fs::symlink_metadata(path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(cause),
            Ok(_) if replaces == Replaces::Nothing => return Err(Errno::EEXIST.into()),
            Ok(there) if there.is_file() => {}
            Ok(_) => {
                let why = "there is something by that name which is no regular file";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        }
        let mut options = OpenOptions::new();
        options.write(true).mode(MODE);
        let nameless = options.clone().custom_flags(OFlag::O_TMPFILE.bits()).open(directory(path));
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            Err(cause) if has_no_such_files(&cause) => {
                let temporary = beside(path)?;
                let file = options.create_new(true).open(&temporary)?;
                (file, Some(temporary))
            }
            Err(cause) => return Err(cause),
        };
        let file = Self { file, path: path.to_owned(), temporary, replaces };
        // Whatever the umask: so that nobody is surprised later.
        file.file.set_permissions(fs::Permissions::from_mode(MODE))?;
        Ok(file)
    }

    /// Appends `bytes`.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Makes it durable and gives it its name.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match (self.temporary.take(), self.replaces) {
            (None, Replaces::Nothing) => self.link(&self.path)?,
            (None, Replaces::File) => {
                let temporary = beside(&self.path)?;
                self.link(&temporary)?;
                self.rename(temporary)?;
            }
            (Some(temporary), Replaces::Nothing) => {
                // Unlike a rename, it takes nobody's name away.
                let linked = fs::hard_link(&temporary, &self.path);
                self.temporary = Some(temporary);
                linked?;
            }
            (Some(temporary), Replaces::File) => self.rename(temporary)?,
        }
        File::open(directory(&self.path))?.sync_all()
    }

    /// Gives the file, which has no name, the name `path`.
    fn link(&self, path: &Path) -> io::Result<()> {
        let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(linkat(AT_FDCWD, nameless.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?)
    }

    fn rename(&mut self, temporary: PathBuf) -> io::Result<()> {
        let renamed = fs::rename(&temporary, &self.path);
        if renamed.is_err() {
            self.temporary = Some(temporary);
        }
        renamed
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Nobody is left to tell.
            let _ = fs::remove_file(temporary);
        }
    }
}

fn has_no_such_files(cause: &io::Error) -> bool {
    let told = cause.raw_os_error().map(Errno::from_raw);
    matches!(told, Some(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL))
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A name of which nobody else thinks, in the same directory.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}.part", u64::from_le_bytes(bytes)));
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// With a temporary name, as where the filesystem has no nameless files.
    fn named(path: &Path, replaces: Replaces) -> NewFile {
        let mut file = NewFile::create(path, replaces).unwrap();
        let temporary = beside(path).unwrap();
        file.file = OpenOptions::new().write(true).create_new(true).open(&temporary).unwrap();
        file.temporary = Some(temporary);
        file
    }

    #[test]
    fn it_has_its_name_when_it_is_whole_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web-1.qcow2");
        for make in [|path: &Path, replaces| NewFile::create(path, replaces).unwrap(), named] {
            let mut file = make(&path, Replaces::Nothing);
            file.write(b"half").unwrap();
            drop(file);
            assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));

            let mut file = make(&path, Replaces::Nothing);
            file.write(b"one").unwrap();
            file.finish().unwrap();
            assert_eq!(
                (names(dir.path()), fs::read(&path).unwrap()),
                (vec!["web-1.qcow2".into()], b"one".to_vec())
            );

            let mut file = make(&path, Replaces::File);
            file.write(b"two").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"one");
            file.finish().unwrap();
            assert_eq!(
                (names(dir.path()), fs::read(&path).unwrap()),
                (vec!["web-1.qcow2".into()], b"two".to_vec())
            );
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_name_that_is_taken_meanwhile_stays_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for make in [|path: &Path, replaces| NewFile::create(path, replaces).unwrap(), named] {
            let file = make(&path, Replaces::Nothing);
            fs::write(&path, "mine").unwrap();
            assert_eq!(file.finish().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!((names(dir.path()).len(), fs::read(&path).unwrap()), (1, b"mine".to_vec()));
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn what_is_no_regular_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path(), Path::new("/dev/null"), Path::new("/")] {
            NewFile::create(path, Replaces::File).unwrap_err();
        }
        let path = dir.path().join("private");
        NewFile::create(&path, Replaces::Nothing).unwrap().finish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
    }
}
