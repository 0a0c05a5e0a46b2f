//! The directory that is the store, and the marker that tells it from a bare
//! mount point.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use super::files::{Dir, During, TEMPORARY};
use crate::{
    error::{Context, Error, Reason, Result},
    store::form::{MAX_SMALL, Marker, random_id},
};

/// File in the root whose presence makes the directory a store.
const MARKER: &str = "imaged-store.json";
/// Directory in the root that holds a directory for each image.
const IMAGES: &str = "images";

/// The root of a store that was there when it was opened.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    id: String,
}

impl Root {
    /// Opens the store at `path` or makes one there.
    ///
    /// Its parent must exist: a missing one is a filesystem that is not
    /// mounted more often than it is a wish. A directory that holds other
    /// things and no marker is refused. Blocks.
    pub fn open(path: &Path) -> Result<Self> {
        let root = match Dir::at(path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => make(path)?,
            opened => opened.during(|| format!("cannot open the store {}", path.display()))?,
        };
        let id = match read_marker(&root)? {
            Some(marker) => marker.id,
            None => adopt(&root)?,
        };
        // Nothing is written where all is there: a read-only store can be read.
        match root.make_dir(IMAGES) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.and_then(|()| root.sync()),
        }
        .during(|| format!("cannot make {}", root.path_of(IMAGES).display()))?;
        Ok(Self { path: path.to_owned(), id })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the directory of images, if the store that was opened is still
    /// there: a filesystem that went away leaves an empty directory, which
    /// must not be written to. Blocks.
    pub fn images(&self) -> Result<Dir> {
        let vanished = |cause: io::Error| {
            let path = self.path.display();
            Error::new(Reason::StoreUnavailable, format!("the store's directory {path} vanished"))
                .because(cause)
                .advice("is it mounted? mount it, or restart imaged to begin a new store there")
        };
        let gone = |cause: &io::Error| {
            matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        };
        let root = match Dir::at(&self.path) {
            Err(cause) if gone(&cause) => return Err(vanished(cause)),
            opened => opened.during(|| format!("cannot open the store {}", self.path.display()))?,
        };
        match read_marker(&root)? {
            Some(marker) if marker.id == self.id => {}
            Some(_) => return Err(vanished(io::Error::other("another store is there now"))),
            None => return Err(vanished(io::Error::other(format!("{MARKER} is not there")))),
        }
        match root.dir(IMAGES) {
            Err(cause) if gone(&cause) => Err(vanished(cause)),
            opened => opened.during(|| format!("cannot open {}", root.path_of(IMAGES).display())),
        }
    }
}

fn make(path: &Path) -> Result<Dir> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    if !parent.exists() {
        let (path, parent) = (path.display(), parent.display());
        return Err(Error::new(
            Reason::StoreUnavailable,
            format!("cannot make the store {path} because {parent} does not exist"),
        )
        .advice("mount its filesystem, or make the directory"));
    }
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .and_then(|()| Dir::at(parent)?.sync())
        .and_then(|()| Dir::at(path))
        .during(|| format!("cannot make the store {}", path.display()))
}

/// The marker, `None` where there is none.
fn read_marker(root: &Dir) -> Result<Option<Marker>> {
    let path = root.path_of(MARKER);
    let bytes = match root.read(MARKER, MAX_SMALL) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.during(|| format!("cannot read {}", path.display()))?,
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .context(Reason::StoreUnavailable, || {
            format!("{} is not the marker of a store of this version", path.display())
        })
        .map_err(|error| error.advice("a newer imaged may have written it: update imaged"))
}

/// Makes a store of an empty directory.
fn adopt(root: &Dir) -> Result<String> {
    let path = root.path().display();
    let entries = std::fs::read_dir(root.path())
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .during(|| format!("cannot list {path}"))?;
    // A fresh ext4 has a lost+found; a temporary marker is what a crash in
    // this very function leaves.
    let own = ["lost+found".to_owned(), format!("{MARKER}{TEMPORARY}")];
    let other = entries.iter().find(|entry| own.iter().all(|own| entry.file_name() != **own));
    if let Some(other) = other {
        let name = other.file_name();
        return Err(Error::new(
            Reason::StoreUnavailable,
            format!("{path} is no store of imaged, and not empty: it holds {name:?}"),
        )
        .advice("give the store an empty directory of its own"));
    }
    let id = random_id()?;
    let marker = serde_json::to_vec_pretty(&Marker::new(id.clone()))
        .context(Reason::Internal, || format!("cannot write the marker of {path}"))?;
    root.publish(MARKER, &marker).during(|| format!("cannot make a store of {path}"))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn report(error: &Error, temp: &tempfile::TempDir) -> String {
        format!("{error:?}").replace(temp.path().to_str().unwrap(), "/srv")
    }

    #[test]
    fn a_store_is_made_one_level_deep_private_and_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("images");
        let made = Root::open(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&path.join(IMAGES)), 0o700);
        assert_eq!(mode(&path.join(MARKER)), 0o600);
        assert_eq!(Root::open(&path).unwrap().id, made.id);

        let deep = Root::open(&temp.path().join("no/where")).unwrap_err();
        insta::assert_snapshot!(report(&deep, &temp), @"
        STORE_UNAVAILABLE: cannot make the store /srv/no/where because /srv/no does not exist
          help: mount its filesystem, or make the directory
        ");
    }

    #[test]
    fn a_directory_with_other_things_is_refused_and_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("lost+found")).unwrap();
        fs::write(temp.path().join("thesis.tex"), "").unwrap();
        let refused = Root::open(temp.path()).unwrap_err();
        insta::assert_snapshot!(report(&refused, &temp), @r#"
        STORE_UNAVAILABLE: /srv is no store of imaged, and not empty: it holds "thesis.tex"
          help: give the store an empty directory of its own
        "#);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
        fs::remove_file(temp.path().join("thesis.tex")).unwrap();
        Root::open(temp.path()).unwrap();
    }

    #[test]
    fn a_store_that_vanished_is_told_from_an_empty_mount_point() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("images");
        let root = Root::open(&path).unwrap();
        root.images().unwrap();
        fs::rename(&path, temp.path().join("elsewhere")).unwrap();
        insta::assert_snapshot!(report(&root.images().unwrap_err(), &temp), @"
        STORE_UNAVAILABLE: the store's directory /srv/images vanished
          0: No such file or directory (os error 2)
          help: is it mounted? mount it, or restart imaged to begin a new store there
        ");
        fs::create_dir(&path).unwrap();
        insta::assert_snapshot!(report(&root.images().unwrap_err(), &temp), @"
        STORE_UNAVAILABLE: the store's directory /srv/images vanished
          0: imaged-store.json is not there
          help: is it mounted? mount it, or restart imaged to begin a new store there
        ");
        Root::open(&path).unwrap();
        insta::assert_snapshot!(report(&root.images().unwrap_err(), &temp), @"
        STORE_UNAVAILABLE: the store's directory /srv/images vanished
          0: another store is there now
          help: is it mounted? mount it, or restart imaged to begin a new store there
        ");
        fs::remove_dir_all(&path).unwrap();
        fs::rename(temp.path().join("elsewhere"), &path).unwrap();
        root.images().unwrap();
    }

    #[test]
    fn a_marker_of_another_version_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join(MARKER), r#"{"schema":"imaged.store/9","id":"x"}"#).unwrap();
        let refused = Root::open(temp.path()).unwrap_err();
        insta::assert_snapshot!(report(&refused, &temp), @"
        STORE_UNAVAILABLE: /srv/imaged-store.json is not the marker of a store of this version
          0: unknown variant `imaged.store/9`, expected `imaged.store/1` at line 1 column 26
          help: a newer imaged may have written it: update imaged
        ");
    }
}
