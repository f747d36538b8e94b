//! From what lapin and the server say to this crate's errors. Refuses to let a
//! lapin type, or a credential, through.

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

use crate::{
    broker::BrokerType,
    error::{Assume, Error, ErrorCode},
    topology::Drift,
};

/// Why the server closed a channel or refused an operation, as far as the
/// adapter tells the reasons apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// 404: no such exchange or queue.
    NotFound,
    /// 403: no permission, or an exclusive consumer is there.
    Access,
    /// 405: the queue belongs to another connection.
    Locked,
    /// 406: other arguments, or a rule is broken.
    Precondition,
}

/// The server's refusal in an error of an operation on one channel; none when
/// the connection failed instead.
pub(super) fn refusal(error: &lapin::Error) -> Option<Refusal> {
    let lapin::ErrorKind::ProtocolError(e) = error.kind() else {
        return None;
    };
    match e.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Some(Refusal::NotFound),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => Some(Refusal::Access),
        AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => Some(Refusal::Locked),
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => Some(Refusal::Precondition),
        _ => None,
    }
}

/// What the server wrote, without lapin's wrapping.
pub(super) fn text(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(e) => e.get_message().to_string(),
        _ => error.to_string(),
    }
}

/// Whether a failed attempt to connect means that we are not let in.
pub(super) fn is_login_refusal(error: &lapin::Error) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(e) => matches!(
            e.kind(),
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
                // A vhost that we may not use, or that does not exist.
                | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
        ),
        lapin::ErrorKind::AuthProviderError(_) => true,
        _ => false,
    }
}

/// The error of a failed attempt to connect to `endpoint`.
pub(super) fn connecting(error: &lapin::Error, endpoint: &str) -> Error {
    if is_login_refusal(error) {
        return Error::new(
            ErrorCode::AuthenticationFailed,
            format!(
                "{endpoint} refused the login: {}; check user, password and vhost",
                text(error)
            ),
        )
        .at(BrokerType::RabbitMq)
        .assuming(Assume::NotSent);
    }
    Error::new(
        ErrorCode::ConnectionFailed,
        format!("no connection to {endpoint}: {}", text(error)),
    )
    .at(BrokerType::RabbitMq)
}

/// The error of a control operation (`what`, such as `declare queue x`), with
/// the code that holds when the server says that the object does not exist.
pub(super) fn operation(
    error: &lapin::Error,
    what: &str,
    missing: ErrorCode,
    failed: ErrorCode,
) -> Error {
    let code = match refusal(error) {
        Some(Refusal::NotFound) => missing,
        Some(Refusal::Access) => ErrorCode::AuthenticationFailed,
        Some(Refusal::Locked | Refusal::Precondition) => failed,
        None => ErrorCode::ConnectionClosed,
    };
    Error::new(code, format!("cannot {what}: {}", text(error))).at(BrokerType::RabbitMq)
}

/// No connection stands now.
pub(super) fn unavailable(reason: Option<&str>) -> Error {
    Error::new(
        ErrorCode::ConnectionFailed,
        match reason {
            Some(why) => format!("RabbitMQ is not connected: {why}"),
            None => "RabbitMQ is not connected".to_owned(),
        },
    )
    .at(BrokerType::RabbitMq)
}

/// The broker was closed by its owner.
pub(super) fn closed() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the RabbitMQ broker is closed",
    )
    .at(BrokerType::RabbitMq)
}

/// An option that RabbitMQ cannot honour.
pub(super) fn unsupported(why: impl Into<String>) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, why).at(BrokerType::RabbitMq)
}

/// The difference that a 406 names: `inequivalent arg 'x-max-priority' for
/// queue 'q' in vhost '/': received none but current is the value '10' of type
/// 'signedint'`.
pub(super) fn drift(message: &str) -> Option<Drift> {
    let rest = message.split_once("inequivalent arg '")?.1;
    let (argument, rest) = rest.split_once("' for ")?;
    let (kind, rest) = rest.split_once(" '")?;
    let (name, rest) = rest.split_once("' in vhost")?;
    let (expected, actual) = rest
        .split_once("received ")?
        .1
        .split_once(" but current is ")?;
    Some(Drift {
        broker: BrokerType::RabbitMq,
        object: format!("{kind} {name}"),
        argument: argument.to_owned(),
        expected: value(expected),
        actual: value(actual),
    })
}

/// `the value '10' of type 'signedint'` -> `10`; `'true'` -> `true`.
fn value(text: &str) -> String {
    match text
        .split_once('\'')
        .and_then(|(_, rest)| rest.split_once('\''))
    {
        Some((inner, _)) => inner.to_owned(),
        None => text.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_406_names_object_argument_and_both_values() {
        let drift = drift(
            "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'helixagent.tasks.llm' in vhost '/': received the value '10' of type 'signedint' but current is none",
        )
        .unwrap();
        assert_eq!(drift.object, "queue helixagent.tasks.llm");
        assert_eq!(drift.argument, "x-max-priority");
        assert_eq!(drift.expected, "10");
        assert_eq!(drift.actual, "none");
    }

    #[test]
    fn a_406_about_durability_and_exchange_types_is_read_too() {
        let text = "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'e' in vhost '/': received 'topic' but current is 'direct'";
        let drift = drift(text).unwrap();
        assert_eq!(
            (drift.object.as_str(), drift.argument.as_str()),
            ("exchange e", "type")
        );
        assert_eq!(
            (drift.expected.as_str(), drift.actual.as_str()),
            ("topic", "direct")
        );
    }

    #[test]
    fn other_text_is_no_drift() {
        assert_eq!(drift("PRECONDITION_FAILED - unknown delivery tag 1"), None);
    }
}
