//! The matrix: which faults strike what, when, and under which promise. Knows
//! which cells make no sense, and why; runs nothing.

use std::fmt;

/// What is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    RabbitMq,
    Kafka,
    /// The hub's process, its clients' link to it, or its data folder.
    Hub,
    /// The readers: the foreign one at the broker and the one over HTTP.
    Consumer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    Kill,
    Stop,
    Pause,
    Cut,
    HalfOpen,
    Slow,
    /// The answers do not arrive, and then the connection is gone.
    LostConfirm,
    FullDisk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    Idle,
    /// One message is under way.
    One,
    Saturated,
    Draining,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Tasks over RabbitMQ, `during_outage: hold`.
    Hold,
    /// Tasks over RabbitMQ, `during_outage: local`.
    Local,
    /// Events over Kafka, `during_outage: hold`.
    Events,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    pub target: Target,
    pub fault: Fault,
    pub moment: Moment,
    pub mode: Mode,
}

impl Cell {
    /// Every combination, those that make no sense included.
    pub fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for target in Target::ALL {
            for fault in Fault::ALL {
                for moment in Moment::ALL {
                    for mode in Mode::ALL {
                        let cell = Self {
                            target,
                            fault,
                            moment,
                            mode,
                        };
                        if cell.exists() {
                            cells.push(cell);
                        }
                    }
                }
            }
        }
        cells
    }

    /// Tasks are RabbitMQ's and events Kafka's; the hub and the readers stand
    /// before both.
    fn exists(self) -> bool {
        match self.target {
            Target::RabbitMq => self.mode != Mode::Events,
            Target::Kafka => self.mode != Mode::Hold,
            Target::Hub | Target::Consumer => true,
        }
    }

    /// Why it cannot be run, whatever the machine.
    pub fn not_applicable(self) -> Option<&'static str> {
        match (self.target, self.fault) {
            (Target::Kafka, _) if self.mode == Mode::Local => {
                Some("`local` is refused for event routes (C7)")
            }
            (Target::Consumer, Fault::Pause) => {
                Some("from outside a paused reader is a silent link: consumer/half-open")
            }
            (Target::Consumer, Fault::FullDisk) => Some("a reader keeps nothing on disk"),
            _ => None,
        }
    }

    /// Which server it needs.
    pub fn uses_kafka(self) -> bool {
        self.mode == Mode::Events
    }
}

impl Target {
    const ALL: [Self; 4] = [Self::RabbitMq, Self::Kafka, Self::Hub, Self::Consumer];

    fn name(self) -> &'static str {
        match self {
            Self::RabbitMq => "rabbitmq",
            Self::Kafka => "kafka",
            Self::Hub => "hub",
            Self::Consumer => "consumer",
        }
    }
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::Kill,
        Self::Stop,
        Self::Pause,
        Self::Cut,
        Self::HalfOpen,
        Self::Slow,
        Self::LostConfirm,
        Self::FullDisk,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Cut => "cut",
            Self::HalfOpen => "half-open",
            Self::Slow => "slow",
            Self::LostConfirm => "lost-confirm",
            Self::FullDisk => "full-disk",
        }
    }
}

impl Moment {
    const ALL: [Self; 4] = [Self::Idle, Self::One, Self::Saturated, Self::Draining];

    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::One => "one",
            Self::Saturated => "saturated",
            Self::Draining => "draining",
        }
    }
}

impl Mode {
    const ALL: [Self; 3] = [Self::Hold, Self::Local, Self::Events];

    /// As a cell is named: events know `hold` only, so it is said that they
    /// are events.
    fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Local => "local",
            Self::Events => "events",
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}/{}/{}",
            self.target.name(),
            self.fault.name(),
            self.moment.name(),
            self.mode.name()
        )
    }
}

/// The cells that a list of names chooses; a part of a name chooses all that
/// agree with it (`rabbitmq/kill`, `*/*/draining`).
pub fn choose(names: &str) -> Vec<Cell> {
    let wanted: Vec<&str> = names.split(',').map(str::trim).collect();
    let agrees = |cell: &Cell, name: &str| {
        let full = cell.to_string();
        name.split('/')
            .zip(full.split('/'))
            .all(|(part, own)| part == "*" || part == own)
    };
    for name in &wanted {
        assert!(
            Cell::all().iter().any(|cell| agrees(cell, name)),
            "FAULTS_CELLS: no cell is named {name}; such as rabbitmq/kill/draining/hold"
        );
    }
    Cell::all()
        .into_iter()
        .filter(|cell| wanted.iter().any(|name| agrees(cell, name)))
        .collect()
}

/// What runs each time: each target, most faults, every moment.
pub const SHORT: &str = "rabbitmq/kill/draining/hold,rabbitmq/pause/saturated/local,\
    rabbitmq/lost-confirm/saturated/hold,kafka/kill/saturated/events,kafka/cut/draining/events,\
    hub/kill/draining/hold,hub/lost-confirm/saturated/events,consumer/kill/saturated/hold,\
    consumer/cut/saturated/events";
