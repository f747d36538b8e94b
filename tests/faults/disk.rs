//! A small disk under the hub's data folder, that can be full.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system in memory; unmounted when dropped.
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// The error says why this machine does not allow it.
    pub fn mount(at: &Path) -> Result<Self, String> {
        std::fs::create_dir_all(at).map_err(|e| e.to_string())?;
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={SIZE}"), "tmpfs"])
            .arg(at)
            .output()
            .map_err(|e| format!("mount: {e}"))?;
        if output.status.success() {
            Ok(Self { at: at.to_owned() })
        } else {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(format!(
                "a small file system needs mount rights here: {why}"
            ))
        }
    }

    /// Takes every byte that is left.
    pub fn fill(&self) {
        let mut ballast = File::create(self.at.join("ballast")).unwrap();
        for piece in [64 * 1024, 512, 1] {
            let zeros = vec![0; piece];
            while ballast.write_all(&zeros).is_ok() {}
        }
    }

    pub fn free(&self) {
        std::fs::remove_file(self.at.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is just ending may still have a file open.
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}

const SIZE: &str = "96m";
