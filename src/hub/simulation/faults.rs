//! What goes wrong: when, for how long, and to whom.

use super::world::{Ev, World};
use crate::hub::lane::machine::Machine;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    CrashKeeping,
    CrashLosing,
    Stall,
    Cut,
    HalfClosed,
    LostConfirm,
    LateConfirm,
    Overload,
    RefusedWhileDraining,
    RefusedLane,
    SlowDisk,
    FailedFsync,
    TornWrite,
    FullSpool,
    Kill,
    PowerCut,
    ConsumerDeath,
    ClockForward,
    ClockBack,
}

impl Fault {
    pub(super) const ALL: [Self; 19] = [
        Self::CrashKeeping,
        Self::CrashLosing,
        Self::Stall,
        Self::Cut,
        Self::HalfClosed,
        Self::LostConfirm,
        Self::LateConfirm,
        Self::Overload,
        Self::RefusedWhileDraining,
        Self::RefusedLane,
        Self::SlowDisk,
        Self::FailedFsync,
        Self::TornWrite,
        Self::FullSpool,
        Self::Kill,
        Self::PowerCut,
        Self::ConsumerDeath,
        Self::ClockForward,
        Self::ClockBack,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::CrashKeeping => "crash, keeping",
            Self::CrashLosing => "crash, losing",
            Self::Stall => "stall",
            Self::Cut => "cut connection",
            Self::HalfClosed => "half-closed lane",
            Self::LostConfirm => "lost confirm",
            Self::LateConfirm => "late confirm",
            Self::Overload => "overload",
            Self::RefusedWhileDraining => "refused while draining",
            Self::RefusedLane => "refused lane",
            Self::SlowDisk => "slow disk",
            Self::FailedFsync => "failed fsync",
            Self::TornWrite => "torn write",
            Self::FullSpool => "full spool",
            Self::Kill => "hub killed",
            Self::PowerCut => "hub power cut",
            Self::ConsumerDeath => "consumer death",
            Self::ClockForward => "clock forward",
            Self::ClockBack => "clock back",
        }
    }
}

impl World {
    /// A fault strikes a lane of a process, and whatever stands beside it.
    pub(super) fn strike(&mut self, fault: Fault, p: usize, l: usize) {
        let b = usize::from(l > 0);
        self.struck += 1;
        self.note_hits(fault, p, b);
        self.trace(|| format!("FAULT {} at process {p} lane {l}", fault.name()));
        match fault {
            Fault::CrashKeeping | Fault::CrashLosing => {
                if self.brokers[b].up {
                    self.crash_broker(b, fault == Fault::CrashLosing);
                    let back = self.rng.u64(50_000..6_000_000);
                    self.post(back, Ev::BrokerUp(b));
                }
            }
            Fault::Stall => {
                self.brokers[b].stalls += 1;
                let secs = [300_000, 2_000_000, 6_000_000, 14_000_000];
                let end = secs[self.rng.usize(..4)] + self.rng.u64(..500_000);
                self.post(end, Ev::StallOver(b));
            }
            Fault::Cut => self.cut(p, b),
            Fault::HalfClosed => {
                if let Some(conn) = self.processes[p].lanes.get(l).and_then(|x| x.conn) {
                    let slow = self.rng.u32(..4) == 0;
                    self.end_conn(conn, slow);
                }
            }
            Fault::LostConfirm => self.brokers[b].lose += self.rng.u32(1..4),
            Fault::LateConfirm => self.brokers[b].delay += self.rng.u32(1..8),
            Fault::Overload => {
                self.brokers[b].overloads += 1;
                let end = self.rng.u64(1_000..3_000_000);
                self.post(end, Ev::OverloadOver(b));
            }
            Fault::RefusedWhileDraining => self.brokers[b].refuse_drained += self.rng.u32(1..4),
            Fault::RefusedLane => {
                self.brokers[b].refuses_lanes += 1;
                let end = self.rng.u64(1_000..2_000_000);
                self.post(end, Ev::RefusalOver(b));
                // Noticed only by who opens one.
                if self.rng.bool() {
                    self.cut(p, b);
                }
            }
            Fault::SlowDisk => {
                self.processes[p].slow += 1;
                let end = self.rng.u64(1_000..5_000_000);
                self.post(end, Ev::DiskFast(p));
            }
            Fault::FailedFsync => self.processes[p].fail_syncs = true,
            Fault::TornWrite | Fault::PowerCut => self.kill_soon(p, true),
            Fault::Kill => self.kill_soon(p, false),
            Fault::FullSpool => {
                let budget = self.processes[p].budget.clone();
                let incarnation = self.processes[p].incarnation;
                let mut taken = 0;
                while taken < self.plan.room && budget.take(0) {
                    taken += 1;
                }
                self.processes[p].hogged += taken;
                let end = self.rng.u64(10_000..8_000_000);
                self.post(end, Ev::Room(p, incarnation, taken));
            }
            Fault::ConsumerDeath => self.kill_consumer(p, b),
            Fault::ClockForward => {
                self.wall += self.rng.i64(1..3_600_000);
                self.wall_most = self.wall_most.max(self.wall);
            }
            Fault::ClockBack => self.wall -= self.rng.i64(1..3_600_000),
        }
    }

    fn note_hits(&mut self, fault: Fault, p: usize, b: usize) {
        let of_broker = matches!(
            fault,
            Fault::CrashKeeping
                | Fault::CrashLosing
                | Fault::Stall
                | Fault::LostConfirm
                | Fault::LateConfirm
                | Fault::Overload
                | Fault::RefusedWhileDraining
                | Fault::RefusedLane
        );
        let of_link = matches!(fault, Fault::Cut | Fault::HalfClosed | Fault::ConsumerDeath);
        for (i, process) in self.processes.iter().enumerate() {
            for (l, lane) in process.lanes.iter().enumerate() {
                let same_broker = usize::from(l > 0) == b;
                let struck = if of_broker {
                    same_broker
                } else {
                    i == p && (same_broker || !of_link)
                };
                if struck {
                    self.table.hit(Machine::state(&lane.machine), fault);
                }
            }
        }
    }
}
