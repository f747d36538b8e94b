//! Rows and their runs, side by side in turn: A B, B A, A B, so that what else
//! the machine does, and what one run leaves to the next, falls on all of them.

use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{latency::Latencies, machine, progress::Progress};
use crate::cli::Failure;

/// One way to do what a scenario measures.
#[async_trait]
pub(crate) trait Row: Send {
    /// How the row is called, once in its scenario.
    fn name(&self) -> String;

    /// What survives of a message that was answered.
    fn durability(&self) -> &'static str;

    /// Does it for `time`.
    ///
    /// # Cancel safety
    /// Everything that it started ends when it is dropped.
    async fn run(&mut self, time: Duration) -> Result<Run, Failure>;
}

/// What a run showed.
#[derive(Debug)]
pub(crate) struct Run {
    /// Messages that were done with.
    pub(crate) messages: u64,
    /// From the start to the last of them.
    pub(crate) elapsed: Duration,
    /// How long each took since it was due; empty where nothing is due.
    pub(crate) latencies: Latencies,
    /// Of those, how many went to the spool, because a confirm was late.
    pub(crate) spooled: u64,
    /// Processor time of this process.
    pub(crate) cpu: Option<Duration>,
}

impl Run {
    /// A run of which no processor time is known yet.
    pub(crate) fn new(messages: u64, elapsed: Duration, latencies: Latencies) -> Self {
        Self {
            messages,
            elapsed,
            latencies,
            spooled: 0,
            cpu: None,
        }
    }

    /// Messages a second.
    #[allow(clippy::cast_precision_loss, reason = "counts are below 2^52")]
    pub(crate) fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 {
            self.messages as f64 / seconds
        } else {
            0.0
        }
    }
}

/// Rows that are compared; the first is the hub.
pub(super) type Group = Vec<Box<dyn Row>>;

/// All runs of a row, in the order of the pairs.
pub(super) struct Runs {
    pub(super) name: String,
    pub(super) durability: &'static str,
    pub(super) runs: Vec<Run>,
}

/// Runs every row of every group `pairs` times.
pub(super) async fn measure(
    groups: Vec<Group>,
    pairs: usize,
    time: Duration,
    progress: &Progress,
) -> Result<Vec<Vec<Runs>>, Failure> {
    progress.expect(groups.iter().map(Vec::len).sum::<usize>() * pairs);
    let mut measured = Vec::with_capacity(groups.len());
    for mut group in groups {
        let mut runs: Vec<Runs> = group
            .iter()
            .map(|row| Runs {
                name: row.name(),
                durability: row.durability(),
                runs: Vec::with_capacity(pairs),
            })
            .collect();
        for row in &mut group {
            progress.say(&format!("warming up: {}", row.name()));
            row.run(time.min(WARM_UP)).await?;
        }
        for pair in 0..pairs {
            for at in in_turn(pair, group.len()) {
                let (Some(row), Some(runs)) = (group.get_mut(at), runs.get_mut(at)) else {
                    continue;
                };
                progress.say(&runs.name);
                let before = machine::cpu_time();
                let mut run = row.run(time).await?;
                run.cpu = before.and_then(|b| machine::cpu_time()?.checked_sub(b));
                if run.messages == 0 {
                    return Err(Failure::new(format!(
                        "{}: nothing came through in {} s; the broker may be stalled, or use a longer -z",
                        runs.name,
                        time.as_secs_f64()
                    )));
                }
                runs.runs.push(run);
                progress.step();
            }
        }
        measured.push(runs);
    }
    progress.done();
    Ok(measured)
}

/// The order of a pair's rows.
fn in_turn(pair: usize, rows: usize) -> Vec<usize> {
    if pair.is_multiple_of(2) {
        (0..rows).collect()
    } else {
        (0..rows).rev().collect()
    }
}

/// Waits until `done`, or says after `patience` what did not happen.
pub(crate) async fn wait_until(
    patience: Duration,
    what: impl FnOnce() -> String,
    mut done: impl FnMut() -> bool,
) -> Result<(), Failure> {
    let until = Instant::now() + patience;
    while !done() {
        if Instant::now() >= until {
            return Err(Failure::new(what()));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// How long each row runs before the first that counts, at most: connections,
/// queues and caches are warm then.
const WARM_UP: Duration = Duration::from_millis(500);
/// How often something is looked at that gives no signal.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long what was sent may take to arrive after a run.
pub(crate) const ARRIVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_turns_and_every_second_pair_goes_backwards() {
        assert_eq!(in_turn(0, 2), [0, 1]);
        assert_eq!(in_turn(1, 2), [1, 0]);
        assert_eq!(in_turn(3, 3), [2, 1, 0]);
    }
}
