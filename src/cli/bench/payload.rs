//! Payloads that do not compress, with or without a stamp of their time.

use std::sync::Arc;

use bytes::Bytes;

use super::latency::Stamp;
use crate::cli::Failure;

/// Payloads that do not compress, one of a few.
#[derive(Clone, Debug)]
pub(crate) struct Bodies {
    kept: Arc<Vec<Bytes>>,
    stamped: bool,
}

impl Bodies {
    /// Payloads of `size` bytes; `stamped` ones begin with a [`Stamp`].
    pub(crate) fn new(size: usize, stamped: bool) -> Result<Self, Failure> {
        if stamped && size < Stamp::SIZE {
            return Err(Failure::usage(format!(
                "-s {size} is too small: a message whose way is timed holds {} bytes of time and number; use -s {} or more",
                Stamp::SIZE,
                Stamp::SIZE
            )));
        }
        let count = (POOL_BYTES / size.max(1)).clamp(2, MOST_BODIES);
        let mut kept = Vec::with_capacity(count);
        for _ in 0..count {
            let mut body = vec![0; size];
            getrandom::fill(&mut body)
                .map_err(|e| Failure::new(format!("no random bytes can be had: {e}")))?;
            kept.push(Bytes::from(body));
        }
        Ok(Self {
            kept: Arc::new(kept),
            stamped,
        })
    }

    /// The payload of a producer's `n`th message.
    pub(super) fn get(&self, n: u64, stamp: Stamp) -> Bytes {
        let at = usize::try_from(n).unwrap_or(0) % self.kept.len().max(1);
        let Some(body) = self.kept.get(at) else {
            return Bytes::new();
        };
        if !self.stamped {
            return body.clone();
        }
        let mut out = Vec::with_capacity(body.len());
        out.extend_from_slice(&stamp.write());
        out.extend_from_slice(body.get(Stamp::SIZE..).unwrap_or_default());
        Bytes::from(out)
    }
}

/// Kept payloads, so that a codec's window (64 KiB of lz4) holds none twice.
const POOL_BYTES: usize = 16 * 1024 * 1024;
const MOST_BODIES: usize = 1024;
