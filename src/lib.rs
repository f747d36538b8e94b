//! One API over RabbitMQ and Kafka that never loses an accepted message.
