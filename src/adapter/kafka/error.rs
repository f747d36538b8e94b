//! What librdkafka's errors mean for the caller (C9). Pure; it decides nothing
//! about connections.

use rdkafka::{error::KafkaError, types::RDKafkaErrorCode as Code};

use crate::{
    broker::{BrokerType, Fate},
    error::{Error, ErrorCode},
};

/// A refusal of an option or setting.
pub(super) fn invalid(why: impl Into<String>) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, why).at(BrokerType::Kafka)
}

/// An operation on a closed broker.
pub(super) fn closed() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "this Kafka broker is closed; make another one",
    )
    .at(BrokerType::Kafka)
}

/// An error of an operation other than a publish: `code` unless librdkafka's
/// own code says something more precise.
pub(super) fn failed(code: ErrorCode, what: &str, error: KafkaError) -> Error {
    let precise = raw_code(&error).and_then(precise).unwrap_or(code);
    let made = Error::new(precise, what);
    // A look-up that was not permitted is a refusal; one that failed is not.
    made.at(BrokerType::Kafka).caused_by(error)
}

/// The code in an error, also where rdkafka does not give it out.
pub(super) fn raw_code(error: &KafkaError) -> Option<Code> {
    match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    }
}

/// What a code means here, where that is one thing.
pub(super) fn precise(code: Code) -> Option<ErrorCode> {
    Some(match code {
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
            ErrorCode::TopicNotFound
        }
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::ClusterAuthorizationFailed => ErrorCode::AuthenticationFailed,
        // kafka.transaction_timeout is above the brokers' transaction.max.timeout.ms.
        Code::InvalidTransactionTimeout => ErrorCode::InvalidConfig,
        Code::BrokerTransportFailure | Code::AllBrokersDown | Code::Resolve | Code::SSL => {
            ErrorCode::ConnectionFailed
        }
        Code::OperationTimedOut | Code::TimedOutQueue | Code::RequestTimedOut => ErrorCode::Timeout,
        _ => return None,
    })
}

/// Whether a batch, of one record or more, was over the limit of its topic.
pub(super) fn is_too_large(error: &KafkaError) -> bool {
    matches!(
        raw_code(error),
        Some(Code::MessageSizeTooLarge | Code::MessageBatchTooLarge)
    )
}

/// What became of a record that was not delivered. `shared`: others may have been in its
/// batch.
pub(super) fn fate(error: &KafkaError, topic: &str, bytes: usize, shared: bool) -> Fate {
    let code = raw_code(error).unwrap_or(Code::Unknown);
    let make = |c: ErrorCode, why: String| {
        Error::new(c, why)
            .at(BrokerType::Kafka)
            .on(topic)
            .caused_by(error.clone())
    };
    match code {
        _ if shared && is_too_large(error) => {
            // The broker turned down the batch that this record shared with others,
            // so the record itself may well be acceptable.
            Fate::Overloaded(make(
                ErrorCode::PublishFailed,
                "the broker refused a whole batch as too large; the topic's max.message.bytes was lowered, try again".to_owned(),
            ))
        }
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize => {
            Fate::Refused(make(
                ErrorCode::MessageTooLarge,
                format!("the record of {bytes} bytes (payload, key and headers) is over the limit of the topic (max.message.bytes) or of kafka.max_message_bytes"),
            ))
        }
        Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => Fate::Refused(make(
            ErrorCode::AuthenticationFailed,
            "not permitted to write to this topic".to_owned(),
        )),
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
            Fate::Refused(make(
                ErrorCode::TopicNotFound,
                "the topic or its partition does not exist; create it, or set kafka.auto_create_topics".to_owned(),
            ))
        }
        Code::InvalidRecord
        | Code::InvalidTopic
        | Code::InvalidTimestamp
        | Code::UnsupportedForMessageFormat
        | Code::PolicyViolation
        | Code::UnsupportedCompressionType
        | Code::InvalidArgument => Fate::Refused(
            make(
                ErrorCode::PublishRejected,
                "the broker refused the record".to_owned(),
            ),
        ),
        Code::NotEnoughReplicas | Code::ISRInsufficient | Code::ThrottlingQuotaExceeded => {
            Fate::Overloaded(make(
                ErrorCode::PublishFailed,
                "too few replicas are in sync, or a quota holds; nothing was stored".to_owned(),
            ))
        }
        // Its batch was turned down for another record's sake: it is not stored,
        // and acceptable by itself.
        Code::InvalidDifferentRecord => Fate::Overloaded(make(
            ErrorCode::PublishFailed,
            "another record of the same batch was refused; try again".to_owned(),
        )),
        Code::MessageTimedOut => Fate::Unknown(make(
            ErrorCode::ConfirmTimeout,
            "no outcome in time; the record may be stored".to_owned(),
        )),
        // A purged record may have been sent before and put back for a retry,
        // so even one that waited in the queue may be stored.
        _ => Fate::Unknown(
            Error::unknown(
                ErrorCode::PublishFailed,
                "the record's outcome is unknown; it may be stored",
            )
            .at(BrokerType::Kafka)
            .on(topic)
            .caused_by(error.clone()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fate_of(code: Code) -> Fate {
        fate(&KafkaError::MessageProduction(code), "t", 100_000, false)
    }

    #[test]
    fn refusals_overload_and_doubt_are_told_apart() {
        for code in [
            Code::MessageSizeTooLarge,
            Code::TopicAuthorizationFailed,
            Code::UnknownTopicOrPartition,
            Code::InvalidRecord,
        ] {
            let Fate::Refused(error) = fate_of(code) else {
                panic!("{code:?}");
            };
            assert!(error.is_refusal(), "{code:?}");
        }
        for code in [Code::NotEnoughReplicas, Code::ThrottlingQuotaExceeded] {
            assert!(matches!(fate_of(code), Fate::Overloaded(_)), "{code:?}");
        }
        for code in [
            Code::NotEnoughReplicasAfterAppend,
            Code::MessageTimedOut,
            Code::PurgeInflight,
            Code::PurgeQueue,
            Code::BrokerTransportFailure,
            Code::OutOfOrderSequenceNumber,
        ] {
            assert!(matches!(fate_of(code), Fate::Unknown(_)), "{code:?}");
        }
    }

    #[test]
    fn a_record_that_shared_a_refused_batch_may_be_tried_again() {
        let shared = |code| fate(&KafkaError::MessageProduction(code), "t", 100, true);
        for code in [Code::MessageSizeTooLarge, Code::MessageBatchTooLarge] {
            assert!(matches!(shared(code), Fate::Overloaded(_)), "{code:?}");
        }
        for code in [Code::InvalidMessageSize, Code::InvalidRecord] {
            assert!(matches!(shared(code), Fate::Refused(_)), "{code:?}");
        }
    }
}
