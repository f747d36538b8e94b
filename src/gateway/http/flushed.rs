//! Knows what has reached the socket. HTTP bodies are buffered on their way
//! out; a stream that commits what was written needs to know when the buffer
//! was empty.
//!
//! The body counts a piece when it gives it to the connection. The connection
//! flushes the socket only after its own buffer went out whole, so at that
//! moment every counted piece is in the kernel's hands. Both run in the
//! connection's task, one after the other, hence nothing is counted between
//! the buffer's end and the flush.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire},
    },
    task::{Context, Poll},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::sync::watch;

/// One connection's account. Clones are the same account.
#[derive(Clone, Debug)]
pub(super) struct Flushed(Arc<Account>);

#[derive(Debug)]
struct Account {
    given: AtomicU64,
    flushed: watch::Sender<u64>,
}

impl Flushed {
    pub(super) fn new() -> Self {
        Self(Arc::new(Account {
            given: AtomicU64::new(0),
            flushed: watch::Sender::new(0),
        }))
    }

    /// Counts a piece as given to the connection.
    pub(super) fn give(&self) {
        self.0.given.fetch_add(1, AcqRel);
    }

    /// Pieces given so far.
    pub(super) fn given(&self) -> u64 {
        self.0.given.load(Acquire)
    }

    /// How many of them have reached the socket, to be watched.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.0.flushed.subscribe()
    }

    fn flush(&self) {
        let given = self.given();
        self.0.flushed.send_if_modified(|flushed| {
            let more = *flushed < given;
            *flushed = given;
            more
        });
    }
}

/// A socket that keeps the account.
pub(super) struct Watched<T> {
    io: T,
    account: Flushed,
}

impl<T> Watched<T> {
    pub(super) fn new(io: T, account: Flushed) -> Self {
        Self { io, account }
    }
}

impl<T: Read + Unpin> Read for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: Write + Unpin> Write for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(cx);
        if let Poll::Ready(Ok(())) = done {
            self.account.flush();
        }
        done
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
