//! What a bench made and must not leave: queues, topics, folders, a broker that
//! it killed. It is told before each is made, and takes them away at the end,
//! however the bench ended.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::baseline;
use crate::cli::Failure;

/// Everything that is still there. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftovers(Arc<Mutex<List>>);

#[derive(Debug, Default)]
struct List {
    /// Address and queue.
    queues: Vec<(String, String)>,
    /// Addresses and topic.
    topics: Vec<(String, String)>,
    /// Addresses and group.
    groups: Vec<(String, String)>,
    folders: Vec<PathBuf>,
    /// The command that starts the broker that was killed.
    broker: Option<String>,
}

impl Leftovers {
    #[cfg_attr(not(feature = "rabbitmq"), allow(dead_code, reason = "no queues"))]
    pub(super) fn queue(&self, url: &str, queue: &str) {
        self.with(|l| l.queues.push((url.to_owned(), queue.to_owned())));
    }

    #[cfg_attr(not(feature = "kafka"), allow(dead_code, reason = "no topics"))]
    pub(super) fn topic(&self, brokers: &str, topic: &str) {
        self.with(|l| l.topics.push((brokers.to_owned(), topic.to_owned())));
    }

    #[cfg_attr(not(feature = "kafka"), allow(dead_code, reason = "no groups"))]
    pub(super) fn group(&self, brokers: &str, group: &str) {
        self.with(|l| l.groups.push((brokers.to_owned(), group.to_owned())));
    }

    /// A broker that this bench killed, until it is started again.
    #[cfg_attr(not(feature = "rabbitmq"), allow(dead_code, reason = "none is killed"))]
    pub(super) fn killed(&self, start: Option<&str>) {
        self.with(|l| l.broker = start.map(str::to_owned));
    }

    /// A new folder of the bench's own, in `parent` or where temporary files go.
    pub(super) fn folder(&self, parent: Option<&Path>, name: &str) -> Result<PathBuf, Failure> {
        let folder = parent
            .map_or_else(std::env::temp_dir, Path::to_path_buf)
            .join(name);
        let made = parent
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::create_dir(&folder));
        made.map_err(|e| {
            Failure::new(format!(
                "the folder {} cannot be made: {e}; choose another with --data",
                folder.display()
            ))
        })?;
        self.with(|l| l.folders.push(folder.clone()));
        Ok(folder)
    }

    /// Takes everything away; what could not be, and why.
    pub(super) async fn remove(&self) -> Vec<String> {
        let list = self.with(std::mem::take);
        let mut left = Vec::new();
        if let Some(start) = &list.broker
            && let Err(e) = super::shell::run(start).await
        {
            left.push(format!("the broker that was killed: {}", e.message));
        }
        let List {
            queues,
            topics,
            groups,
            folders,
            broker: _,
        } = list;
        let removing = async {
            left.extend(baseline::remove_queues(queues).await);
            left.extend(baseline::remove_topics(topics, groups).await);
        };
        if tokio::time::timeout(PATIENCE, removing).await.is_err() {
            left.push("the broker does not answer; what the bench made is still there".to_owned());
        }
        for folder in folders {
            if let Err(e) = remove_folder(&folder).await {
                left.push(format!("folder {}: {e}", folder.display()));
            }
        }
        left
    }

    fn with<T>(&self, change: impl FnOnce(&mut List) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Removes a folder with everything in it. A hub that was cut off in the middle
/// may go on writing for a moment.
async fn remove_folder(folder: &Path) -> std::io::Result<()> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir_all(folder) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if tries == TRIES => return Err(e),
            Err(_) => tries += 1,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How often a folder is tried again, and the pause in between.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(200);
/// How long taking things away may take.
const PATIENCE: Duration = Duration::from_secs(30);
