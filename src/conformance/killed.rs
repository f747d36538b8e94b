//! The embedded broker on its journal as a backend that is killed and comes
//! back, under clients that go on, as those of a server would.
//!
//! A kill, as far as one process can show it: from that moment nothing that the
//! broker answers counts, and what comes back is made from a copy of its folder
//! as it lay there just then, with whatever was half written. A test that kills a
//! real process is beside the broker's own tests.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Capabilities, Capability, Factory, Restart, Target, Wanted,
    embedded::{EmbeddedFactory, on_disk},
};
use crate::{
    adapter::embedded::EmbeddedBroker,
    broker::{
        BrokerType, Consumer, ConsumerControl, Delivery, Handler, MessageBroker, PublishOptions,
        Receipt, RetryMode, Source, SubscribeOptions, Subscription, consumer::ConsumerState,
    },
    error::{Error, ErrorCode, Result},
    message::Message,
    topic::Topic,
};

/// The factory; for the checks that kill. The others are for
/// [`EmbeddedFactory::on_disk`], whose clients are the broker itself.
pub struct KilledEmbedded {
    server: Arc<Server>,
}

impl KilledEmbedded {
    /// Starts the broker in folders under `dir`.
    ///
    /// # Errors
    /// Why it did not start.
    pub async fn start(dir: impl Into<PathBuf>) -> Result<Self> {
        let server = Server {
            dir: dir.into(),
            lives: Mutex::new(0),
            running: watch::channel(None).0,
        };
        server.start().await?;
        Ok(Self {
            server: Arc::new(server),
        })
    }
}

#[async_trait]
impl Factory for KilledEmbedded {
    fn name(&self) -> String {
        EmbeddedFactory::ON_DISK.to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        use Capability as C;
        Capabilities::from([
            C::Queues,
            C::Streams,
            C::HistoryReplay,
            C::Persistent,
            C::OutlivesClient,
        ])
    }

    async fn connect(&self) -> Result<Arc<dyn Target>> {
        Ok(Arc::new(Client {
            server: self.server.clone(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    fn restart(&self) -> Option<&dyn Restart> {
        Some(&*self.server)
    }
}

/// What is killed and started.
struct Server {
    dir: PathBuf,
    /// How often it was killed; each life has a folder of its own.
    lives: Mutex<u32>,
    running: watch::Sender<Option<Arc<Life>>>,
}

/// The broker from a start to a kill.
struct Life {
    broker: Arc<EmbeddedBroker>,
    dead: AtomicBool,
}

impl Server {
    fn folder(&self, next: bool) -> PathBuf {
        let mut lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        *lives += u32::from(next);
        self.dir.join(lives.to_string())
    }

    async fn start(&self) -> Result<()> {
        let broker = on_disk(&self.folder(false));
        broker.connect().await?;
        let dead = AtomicBool::new(false);
        self.running
            .send_replace(Some(Arc::new(Life { broker, dead })));
        Ok(())
    }

    fn life(&self) -> Result<Arc<Life>> {
        self.running.borrow().clone().ok_or_else(|| {
            Error::new(ErrorCode::ConnectionClosed, "the broker was killed")
                .at(BrokerType::InMemory)
        })
    }

    fn target(&self) -> Result<Arc<dyn MessageBroker>> {
        Ok(self.life()?.broker.clone())
    }
}

#[async_trait]
impl Restart for Server {
    async fn kill(&self) -> Result<(), String> {
        let Some(life) = self.running.send_replace(None) else {
            return Err("it is not running".to_owned());
        };
        // Before the copy: whoever looks at this after an answer, and finds it
        // alive, has an answer that was synced before the copy began.
        life.dead.store(true, Ordering::SeqCst);
        let (from, to) = (self.folder(false), self.folder(true));
        let copied = copy(from, to).await;
        life.broker.close().await.map_err(|e| e.to_string())?;
        copied.map_err(|e| e.to_string())
    }

    async fn start(&self) -> Result<(), String> {
        Self::start(self).await.map_err(|e| e.to_string())
    }
}

impl Life {
    /// An answer counts only if the broker lived when it was given.
    fn told<T>(&self, answer: Result<T>) -> Result<T> {
        if self.dead.load(Ordering::SeqCst) {
            return Err(Error::unknown(
                ErrorCode::ConnectionClosed,
                "the broker was killed before it answered",
            )
            .at(BrokerType::InMemory));
        }
        answer
    }
}

/// A client that goes on after a kill.
struct Client {
    server: Arc<Server>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

#[async_trait]
impl Target for Client {
    async fn declare(&self, topic: &Topic, wanted: &Wanted) -> Result<()> {
        let life = self.server.life()?;
        let target = self.server.target()?;
        life.told(target.declare(topic, wanted).await)
    }

    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        let life = self.server.life()?;
        life.told(life.broker.publish(topic, message, options).await)
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        let life = match self.server.life() {
            Ok(life) => life,
            Err(error) => return messages.iter().map(|_| Err(error.clone())).collect(),
        };
        let messages = messages.into_iter().map(Arc::new).collect();
        let answers = life.broker.publish_batch(topic, messages, options).await;
        answers.into_iter().map(|a| life.told(a)).collect()
    }

    /// Works while the broker is away, and begins when it is back.
    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        let first = match self.server.life() {
            Ok(life) => Some(life.broker.consume(source, options).await?),
            Err(_) => None,
        };
        let (deliveries, receiver) = mpsc::channel(1);
        let (control, stopping, report) = ConsumerControl::new();
        let following = Following {
            server: self.server.clone(),
            source: source.clone(),
            options: options.clone(),
            stopping,
            closed: self.closed.clone(),
            report,
        };
        self.tasks.spawn(following.run(first, deliveries));
        Ok(Consumer {
            deliveries: receiver,
            control,
            retry: match source {
                Source::Queue(_) => RetryMode::Broker,
                Source::Stream(_) => RetryMode::InLane,
            },
        })
    }

    async fn subscribe(
        &self,
        _source: &Source,
        _options: SubscribeOptions,
        _handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        Err(Error::new(
            ErrorCode::InvalidConfig,
            "this target has consumers only; handlers are for EmbeddedFactory::on_disk",
        ))
    }

    fn description(&self) -> Vec<String> {
        vec![EmbeddedFactory::ON_DISK.to_owned()]
    }

    async fn health_check(&self) -> Result<()> {
        self.server.life()?.broker.health_check().await
    }

    async fn close(&self) -> Result<()> {
        self.closed.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        Ok(())
    }
}

/// A consumer that goes from one life of the broker to the next.
struct Following {
    server: Arc<Server>,
    source: Source,
    options: SubscribeOptions,
    stopping: CancellationToken,
    closed: CancellationToken,
    report: watch::Sender<ConsumerState>,
}

impl Following {
    async fn run(self, mut first: Option<Consumer>, deliveries: mpsc::Sender<Vec<Delivery>>) {
        loop {
            let consumer = match first.take() {
                Some(consumer) => Ok(Some(consumer)),
                None => self.again().await,
            };
            let mut consumer = match consumer {
                Ok(Some(consumer)) => consumer,
                Ok(None) => break,
                Err(error) => {
                    let why = error.to_string().into();
                    self.report.send_replace(ConsumerState::Failed(why));
                    return;
                }
            };
            self.report.send_replace(ConsumerState::Active);
            if self.forward(&mut consumer, &deliveries).await {
                self.report.send_replace(ConsumerState::Starting);
                continue;
            }
            let control = consumer.control.clone();
            control.begin_stop();
            drop(consumer);
            drop(deliveries);
            tokio::select! {
                () = self.closed.cancelled() => {}
                () = control.stop() => {}
            }
            break;
        }
        self.report.send_replace(ConsumerState::Stopped);
    }

    /// A consumer of the next life; none when nobody wants one any more.
    async fn again(&self) -> Result<Option<Consumer>> {
        let mut running = self.server.running.subscribe();
        loop {
            let life = running.borrow_and_update().clone();
            if let Some(life) = life {
                match life.broker.consume(&self.source, &self.options).await {
                    Ok(consumer) => return Ok(Some(consumer)),
                    Err(error) if !life.dead.load(Ordering::SeqCst) => return Err(error),
                    Err(_) => {}
                }
            }
            tokio::select! {
                () = self.stopping.cancelled() => return Ok(None),
                () = self.closed.cancelled() => return Ok(None),
                changed = running.changed() => if changed.is_err() { return Ok(None) },
            }
        }
    }

    /// Hands on what comes. True when the broker died, false when it is enough.
    async fn forward(
        &self,
        consumer: &mut Consumer,
        deliveries: &mpsc::Sender<Vec<Delivery>>,
    ) -> bool {
        loop {
            let batch = tokio::select! {
                () = self.stopping.cancelled() => return false,
                () = self.closed.cancelled() => return false,
                () = deliveries.closed() => return false,
                batch = consumer.deliveries.recv() => batch,
            };
            let Some(batch) = batch else { return true };
            tokio::select! {
                () = self.stopping.cancelled() => return false,
                () = self.closed.cancelled() => return false,
                sent = deliveries.send(batch) => if sent.is_err() { return false },
            }
        }
    }
}

/// Copies a folder of files that are being written. Where files came or went
/// meanwhile it is done again, because no crash shows a folder in two states.
async fn copy(from: PathBuf, to: PathBuf) -> io::Result<()> {
    for _ in 0..MOST_COPIES {
        let (from, to) = (from.clone(), to.clone());
        let copied = spawn_blocking(move || copy_once(&from, &to)).await;
        if copied.map_err(io::Error::other)?? {
            return Ok(());
        }
        // The writer's own work is what is waited for; it tells nobody of it.
        tokio::time::sleep(COPY_PAUSE).await;
    }
    Err(io::Error::other("the folder does not come to rest"))
}

/// Whether the copy is of one state.
fn copy_once(from: &Path, to: &Path) -> io::Result<bool> {
    let before = files(from)?;
    let copied = copy_files(from, to, &before);
    if files(from)? == before {
        return copied.map(|()| true);
    }
    fs::remove_dir_all(to)?;
    Ok(false)
}

/// The files of the folders in a folder, by folder and name.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in fs::read_dir(dir)? {
        for file in fs::read_dir(folder?.path())? {
            let file = file?.path();
            found.extend(file.strip_prefix(dir).map(Path::to_path_buf));
        }
    }
    found.sort();
    Ok(found)
}

fn copy_files(from: &Path, to: &Path, files: &[PathBuf]) -> io::Result<()> {
    for file in files {
        let target = to.join(file);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from.join(file), target)?;
    }
    Ok(())
}

const MOST_COPIES: u32 = 100;
const COPY_PAUSE: Duration = Duration::from_millis(10);
