//! The file operations that a journal needs, and their real implementation. It
//! knows nothing of formats. Tests put a disk in its place that crashes, tears
//! and fails.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A folder of segment files.
pub(super) trait Storage: Send + Sync {
    /// The folder, for messages.
    fn path(&self) -> &Path;
    /// Names of the files in it.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes a new file and allocates `bytes` zeros for it where that is
    /// possible. Leaves nothing behind when it fails.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn SegmentFile>>;
    /// Opens a file to read, and to truncate.
    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>>;
    /// Deletes a file; what is open stays readable.
    fn delete(&self, name: &str) -> io::Result<()>;
    /// Makes what was created and deleted durable.
    fn sync_dir(&self) -> io::Result<()>;
}

/// One file of it.
pub(super) trait SegmentFile: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills the buffer as far as the file goes and says how far.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes everything or fails.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes everything written durable (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// Cuts the file off.
    fn truncate(&self, len: u64) -> io::Result<()>;
}

/// A folder on a file system.
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes the folder if it is missing, for this user only.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true);
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(path)?;
            // The folder's own entry must survive a power cut as well.
            if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
                sync_folder(parent)?;
            }
        }
        Ok(Self { path: path.into() })
    }
}

impl Storage for Folder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.path)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries
            .into_iter()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn SegmentFile>> {
        let path = self.path.join(name);
        let file =
            private(OpenOptions::new().read(true).write(true).create_new(true)).open(&path)?;
        if let Err(error) = allocate(&file, bytes) {
            // The first error is the one that counts; the name must be free for
            // the next attempt.
            drop(file);
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Arc::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path.join(name))?;
        Ok(Arc::new(file))
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        sync_folder(&self.path)
    }
}

impl SegmentFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len();
        while !buffer.is_empty() {
            match read_some_at(self, offset, buffer) {
                Ok(0) => break,
                Ok(n) => {
                    offset += n as u64;
                    buffer = buffer.get_mut(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(wanted - buffer.len())
    }

    #[cfg(unix)]
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }

    #[cfg(windows)]
    fn write_at(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = std::os::windows::fs::FileExt::seek_write(self, bytes, offset)?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += n as u64;
            bytes = bytes.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

/// Files that only their owner may read: bodies are other people's messages.
pub(super) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

#[cfg(unix)]
fn read_some_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_some_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Windows writes its directories ahead by itself and cannot sync one.
#[cfg(windows)]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Allocates the file's blocks, so that later syncs carry data and no metadata,
/// and so that a full disk is noticed before anything depends on the space.
#[cfg(target_os = "linux")]
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::{fs::FallocateFlags, io::Errno};
    loop {
        return match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => continue,
            // The file system cannot: the file grows as it is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            other => Ok(other?),
        };
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(_: &File, _: u64) -> io::Result<()> {
    Ok(())
}
