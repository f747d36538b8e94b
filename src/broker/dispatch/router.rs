//! Handlers by message type.

use std::{collections::HashMap, fmt, sync::Arc};

use crate::broker::{Handler, HandlerError, Received, handler::HandlerFuture};

/// A handler that passes each message to the handler registered for its type.
/// A type without one goes to the fallback, or, without a fallback, straight to
/// the dead letters: acking what nobody handles would lose it silently.
#[derive(Clone, Default)]
pub struct TypeRouter {
    handlers: HashMap<String, Arc<dyn Handler>>,
    fallback: Option<Arc<dyn Handler>>,
}

impl TypeRouter {
    /// A router that knows no type yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers the handler of a type; a later one replaces an earlier one.
    #[must_use]
    pub fn on(mut self, kind: impl Into<String>, handler: impl Handler) -> Self {
        self.handlers.insert(kind.into(), Arc::new(handler));
        self
    }

    /// Sets the handler of types that have none.
    #[must_use]
    pub fn otherwise(mut self, handler: impl Handler) -> Self {
        self.fallback = Some(Arc::new(handler));
        self
    }

    /// Whether it has a handler for a type.
    #[must_use]
    pub fn handles(&self, kind: &str) -> bool {
        self.fallback.is_some() || self.handlers.contains_key(kind)
    }
}

impl Handler for TypeRouter {
    fn handle(&self, received: Received) -> HandlerFuture {
        let handler = self
            .handlers
            .get(&received.message.kind)
            .or(self.fallback.as_ref());
        match handler {
            Some(handler) => handler.handle(received),
            None => {
                let error = HandlerError::reject(format!(
                    "no handler is registered for the type {:?}",
                    received.message.kind
                ));
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }
}

impl fmt::Debug for TypeRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TypeRouter")
            .field("types", &self.handlers.keys())
            .field("fallback", &self.fallback.is_some())
            .finish()
    }
}
