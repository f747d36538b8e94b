//! How often a message makes the hub ask for memory, on its way through the
//! embedded broker in memory. Counts, unlike times, are the same on a busy
//! machine: what grows here has grown for everybody.
//!
//! A change that needs fewer lowers the number that is written down below; one
//! that needs more than a twentieth more fails, and raises it only with a reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use messaging_hub::{
    HandlerError, Message, MessagingSystem, SubscribeOptions, broker::Received,
    config::MessagingConfig, hub::Publisher,
};
use tokio::sync::Notify;

// The allocator counts; nothing of it is in the library.
#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

#[test]
fn a_message_asks_for_no_more_memory_than_it_did() {
    let _profiler = dhat::Profiler::builder().testing().build();
    // One thread, so that every run does the same in the same order.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (publish, dispatch) = runtime.block_on(counted());
    println!("allocations of a message: publish {publish:.2}, dispatch {dispatch:.2}");
    for (what, counted, recorded) in [
        ("a publish", publish, PUBLISH),
        ("a dispatch", dispatch, DISPATCH),
    ] {
        assert!(
            counted <= recorded * 1.05,
            "{what} allocates {counted:.2} times, {recorded} are written down"
        );
    }
}

/// Allocations of a publish, and of a delivery to a handler with its ack.
async fn counted() -> (f64, f64) {
    let system = MessagingSystem::start(MessagingConfig::builtin())
        .await
        .unwrap();
    let publisher = system.hub().publisher(QUEUE).unwrap();
    // Queues, lanes and maps grow to their size.
    publish(&publisher).await;
    handle(&system).await;
    let before = allocations();
    publish(&publisher).await;
    let between = allocations();
    handle(&system).await;
    let after = allocations();
    system.close().await;
    let each = |n: u64| n as f64 / MESSAGES as f64;
    (each(between - before), each(after - between))
}

async fn publish(publisher: &Publisher) {
    let mut pending = Vec::with_capacity(WINDOW);
    for _ in 0..MESSAGES / WINDOW {
        for _ in 0..WINDOW {
            let message = Message::new("kind", &b"payload"[..]);
            pending.push(publisher.enqueue(message).await.unwrap());
        }
        for one in pending.drain(..) {
            one.await.unwrap();
        }
    }
}

async fn handle(system: &MessagingSystem) {
    let (count, done) = (AtomicU64::new(0), Arc::new(Notify::new()));
    let tell = done.clone();
    let handler = move |_: Received| {
        if count.fetch_add(1, Relaxed) + 1 == MESSAGES as u64 {
            tell.notify_one();
        }
        std::future::ready(Ok::<(), HandlerError>(()))
    };
    let options = SubscribeOptions::default().with_prefetch(100);
    let subscription = system
        .hub()
        .subscribe(QUEUE, options, handler)
        .await
        .unwrap();
    done.notified().await;
    subscription.unsubscribe().await;
}

fn allocations() -> u64 {
    dhat::HeapStats::get().total_blocks
}

const QUEUE: &str = "tasks.allocations";
const MESSAGES: usize = 10_000;
const WINDOW: usize = 100;
/// What was counted when this was written.
const PUBLISH: f64 = 10.6;
const DISPATCH: f64 = 4.3;
