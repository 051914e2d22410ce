//! Waiting in tests: for a state and never for a time, and with the state that was seen last when it does not come.

use std::future::Future;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Asks until the answer is `Ok`. An `Err` says what was seen instead; after the timeout the last one is what the test fails with.
#[track_caller]
pub fn eventually<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    timeout: Duration,
    mut ask: impl FnMut() -> F,
) -> impl Future<Output = T> {
    // An async fn would blame this file for the failure of its caller.
    let caller = std::panic::Location::caller();
    async move {
        let end = Instant::now() + timeout;
        loop {
            // An answer that never comes must not outlast the timeout; one that is asked for last gets a moment.
            let patience = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
            let state = match tokio::time::timeout(patience, ask()).await {
                Ok(Ok(value)) => return value,
                Ok(Err(state)) => state,
                Err(_) => "no answer".to_owned(),
            };
            assert!(Instant::now() < end, "{caller}: waited {timeout:?} for {what}; last seen: {state}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}
