//! One of the broker's two logs (queues, streams): what happens to the state is
//! written here first, under the same lock, so that the order on disk is the
//! order of the state. A broker in memory has logs that keep nothing.

use bytes::Bytes;

#[cfg(feature = "journal")]
use crate::journal::{Batch, Journal, JournalError};
use crate::{
    broker::{BrokerType, Fate},
    error::{Error, ErrorCode},
};

/// A record, by its number in its log; rising, never used twice.
pub(super) type RecordId = u64;

/// A log.
#[derive(Default)]
pub(super) struct Log {
    #[cfg(feature = "journal")]
    journal: Option<Journal>,
    /// The number of the last batch.
    last: u64,
    /// A failure was told; it is not told for each message.
    #[cfg(feature = "journal")]
    told: bool,
}

/// Why a log took nothing of a batch.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "journal"), allow(dead_code))]
pub(super) enum Refused {
    /// There is no room now.
    Full(String),
    /// It can never be taken.
    TooLarge(String),
    /// The log failed, or was closed.
    Broken(String),
}

impl Log {
    /// A log that is kept in a journal.
    #[cfg(feature = "journal")]
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            journal: Some(journal),
            last: 0,
            told: false,
        }
    }

    /// Whether anything is kept.
    pub(super) fn is_durable(&self) -> bool {
        #[cfg(feature = "journal")]
        return self.journal.is_some();
        #[cfg(not(feature = "journal"))]
        false
    }

    /// The number of the last batch; 0 when there was none.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Writes records and takes others away, together or not at all. Returns
    /// the number of the first; the others follow.
    ///
    /// # Errors
    /// Why nothing of it was taken.
    pub(super) fn write(
        &mut self,
        puts: Vec<Bytes>,
        removes: &[RecordId],
    ) -> Result<RecordId, Refused> {
        #[cfg(feature = "journal")]
        if let Some(journal) = &self.journal {
            let mut batch = Batch::new();
            for put in puts {
                batch.put(put);
            }
            for id in removes {
                batch.remove(*id);
            }
            return match journal.append(batch) {
                Ok(appended) => {
                    self.last = appended.lsn;
                    Ok(appended.first)
                }
                Err(error) => {
                    let refused = Refused::from(error);
                    if matches!(refused, Refused::Broken(_)) && !self.told {
                        self.told = true;
                        tracing::error!("the embedded broker's {}", refused.why());
                    }
                    Err(refused)
                }
            };
        }
        let _ = (puts, removes);
        Err(Refused::Broken("there is no journal".to_owned()))
    }

    /// Takes records away, in batches that keep a frame small. What is lost
    /// when the log is broken comes again after a restart, as the messages do
    /// that were acked and not synced.
    pub(super) fn remove(&mut self, records: &[RecordId]) {
        for some in records.chunks(REMOVES) {
            if self.write(Vec::new(), some).is_err() {
                return;
            }
        }
    }
}

impl Refused {
    pub(super) fn why(&self) -> &str {
        match self {
            Self::Full(why) | Self::TooLarge(why) | Self::Broken(why) => why,
        }
    }

    /// What became of a publish: nothing of it is stored in any case.
    pub(super) fn fate(&self) -> Fate {
        let error = self.error(ErrorCode::PublishFailed);
        match self {
            Self::Full(_) => Fate::Overloaded(error),
            Self::TooLarge(_) => Fate::Refused(error),
            Self::Broken(_) => Fate::Unsent(error),
        }
    }

    /// The error of an operation that failed for this, with its own code.
    pub(super) fn error(&self, code: ErrorCode) -> Error {
        match self {
            Self::TooLarge(why) => Error::rejected(ErrorCode::MessageTooLarge, why),
            Self::Full(why) | Self::Broken(why) => Error::new(code, why),
        }
        .at(BrokerType::InMemory)
    }
}

#[cfg(feature = "journal")]
impl From<JournalError> for Refused {
    fn from(error: JournalError) -> Self {
        let why = error.to_string();
        match error {
            JournalError::Full => Self::Full(why),
            JournalError::TooLarge { .. } => Self::TooLarge(why),
            _ => Self::Broken(why),
        }
    }
}

/// Records that one batch takes away at most.
const REMOVES: usize = 4096;
