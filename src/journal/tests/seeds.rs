//! Random work against a model, with power cuts, over many seeds.

use std::sync::Mutex;

use super::{disk::Faults, *};

#[test]
fn random_work_with_power_cuts_loses_nothing_that_was_durable() {
    let seeds = std::env::var("JOURNAL_SEEDS").map_or(100, |n| n.parse().unwrap());
    let mut seen = Seen::default();
    for seed in 0..seeds {
        run(seed, &mut seen);
    }
    eprintln!("{seeds} seeds: {seen:?}");
    assert!(
        seen.cuts > 0 && seen.moved > 0 && seen.deleted > 0 && seen.torn > 0,
        "the seeds did not reach what they should: {seen:?}"
    );
}

#[derive(Debug, Default)]
struct Seen {
    cuts: u64,
    /// Opened entries that compaction had moved.
    moved: u64,
    deleted: u64,
    torn: u64,
    cuts_while_opening: u64,
    batches: u64,
    lost_unsynced: u64,
}

fn run(seed: u64, seen: &mut Seen) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut disk = Disk::new();
    let mut model = Model::default();
    let mut synced = 0;
    for generation in 0..4 {
        let context = format!("seed {seed}, generation {generation}");
        let (mut rig, found) = open(&mut disk, &mut rng, seen, &context);
        let kept = model.check(&found, synced, &context);
        seen.lost_unsynced += (model.batches.len() - kept) as u64;
        seen.torn += u64::from(rig.report.torn.is_some());
        seen.deleted += u64::from(disk.names().first().is_some_and(|n| !n.ends_with("01.seg")));
        model = Model::new(found);
        let faults = Faults {
            crash_at: (!rng.bool()).then(|| rng.u64(1..120)),
            ..Faults::default()
        };
        disk.set_faults(faults);
        let shared_model = Arc::new(Mutex::new(std::mem::take(&mut model)));
        disk.set_hook(Some(busy_callers(&rig, &shared_model, rng.fork())));
        for _ in 0..rng.u32(1..200) {
            let mut model = shared_model.lock().unwrap();
            let batch = random_batch(&mut rng, &model);
            let Ok(_) = model.append(&rig, batch) else {
                break;
            };
            drop(model);
            if rng.u8(..4) == 0 && rig.turn().is_err() {
                break;
            }
            check_reads(&rig, &shared_model.lock().unwrap(), &mut rng, &context);
        }
        disk.set_hook(None);
        model = std::mem::take(&mut *shared_model.lock().unwrap());
        synced = rig.synced();
        seen.batches += model.batches.len() as u64;
        let state = rig.shared.lock();
        seen.moved += model
            .now
            .keys()
            .filter(|&&id| state.index.locate(id).is_some_and(|place| !place.home))
            .count() as u64;
        drop(state);
        if rng.bool() && !disk.crashed() {
            disk.set_faults(Faults::default());
            rig.close();
            synced = model.batches.len() as Lsn;
        }
        seen.cuts += 1;
        disk = disk.after_power_cut(&mut rng);
    }
}

/// Callers who go on appending and removing while the writer waits for the disk.
fn busy_callers(
    rig: &Rig,
    model: &Arc<Mutex<Model>>,
    mut rng: fastrand::Rng,
) -> Box<dyn FnMut() + Send> {
    let (shared, model) = (rig.shared.clone(), model.clone());
    Box::new(move || {
        // The test's own reads hold the model, and nothing is appended to it then.
        if rng.u8(..3) == 0
            && let Ok(mut model) = model.try_lock()
        {
            let batch = random_batch(&mut rng, &model);
            // Refused when full or stopped, as anybody may be.
            let _ = model.append_to(&shared, batch);
        }
    })
}

/// Opens, with a power cut while opening now and then.
fn open(
    disk: &mut Disk,
    rng: &mut fastrand::Rng,
    seen: &mut Seen,
    context: &str,
) -> (Rig, Entries) {
    if rng.u8(..4) == 0 {
        disk.set_faults(Faults {
            crash_at: Some(rng.u64(1..4)),
            ..Faults::default()
        });
        let _ = Rig::open(disk);
        seen.cuts_while_opening += u64::from(disk.crashed());
        *disk = disk.after_power_cut(rng);
    }
    let options = if rng.bool() { small() } else { late() };
    Rig::open_with(disk, options).unwrap_or_else(|e| panic!("{context}: {e}"))
}

/// Puts of all sizes, and removes that leave a straggler here and there.
fn random_batch(rng: &mut fastrand::Rng, model: &Model) -> Batch {
    let mut batch = Batch::new();
    for _ in 0..rng.usize(..4) {
        let len = match rng.u8(..50) {
            0 => rng.usize(4000..9000),
            1..10 => 0,
            _ => rng.usize(..400),
        };
        batch.put(body(rng.u64(..), len));
    }
    let many = if model.now.len() > 40 { 8 } else { 3 };
    for _ in 0..rng.usize(..many) {
        if let Some(&id) = rng.choice(model.now.keys().collect::<Vec<_>>())
            && id % 16 != 0
        {
            batch.remove(id);
        }
    }
    batch
}

fn check_reads(rig: &Rig, model: &Model, rng: &mut fastrand::Rng, context: &str) {
    let newest = model.now.keys().next_back().copied().unwrap_or(0);
    let from = rng.u64(..=newest);
    let mut ids: Vec<_> = (from..from + rng.u64(..20)).collect();
    if rng.bool() {
        rng.shuffle(&mut ids);
    }
    let read = rig.read(&ids).unwrap_or_else(|e| panic!("{context}: {e}"));
    let expected: Vec<_> = ids.iter().map(|id| model.now.get(id).cloned()).collect();
    assert_eq!(read, expected, "{context}: reading {ids:?}");
}
