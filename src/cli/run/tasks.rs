//! The tasks of the operator, from its start to its end: whichever ends first ends the process, and after a stop they end
//! in order.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::api::counted;
use crate::controller::shutdown::{SHUTDOWN, ShutdownReport};

/// The controller keeps its own time at the end; so long after that it is taken for stuck.
const STUCK: Duration = Duration::from_millis(200);

/// After it, the lease has at least and at most this long to be given back.
const RELEASE: (Duration, Duration) = (Duration::from_millis(600), Duration::from_millis(2600));

/// So long after SIGTERM nothing is waited for any longer: neither the lease nor events.
const END: Duration = Duration::from_secs(5);

/// The tasks that live as long as the process.
pub(super) struct Tasks {
    pub signals: JoinHandle<()>,
    pub health: JoinHandle<std::io::Result<()>>,
    pub election: JoinHandle<()>,
    pub controller: JoinHandle<ShutdownReport>,
}

impl Tasks {
    /// Waits until the process is told to stop.
    ///
    /// # Errors
    /// When a task ends before that, whichever it is and however it ends: the process ends with it.
    pub async fn until_stopped(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            result = &mut self.signals => bail!("listening for signals ended: {}", how(result.map(Ok))),
            result = &mut self.health => bail!("the health server ended: {}", how(result)),
            result = &mut self.election => bail!("the election ended: {}", how(result.map(Ok))),
            result = &mut self.controller => bail!("the controller ended: {}", how(result.map(|_| Ok(())))),
        }
    }

    /// Sweeps end, their counts are published, and only then, by `ended`, may another replica begin.
    ///
    /// # Errors
    /// When sweeps take too long, when rows could not be counted, or when a task ends by a panic.
    pub async fn drain(self, ended: &CancellationToken) -> anyhow::Result<()> {
        let end = Instant::now() + END;
        let left = || end.saturating_duration_since(Instant::now());
        let stopped = match timeout(SHUTDOWN + STUCK, self.controller).await {
            Ok(result) => result.context("the controller panicked")?,
            Err(_) => bail!("the controller did not end within {:?} of the signal", SHUTDOWN + STUCK),
        };
        // The lease is kept until it runs out: what may still be going on ends before that.
        if stopped.sweeping > 0 {
            bail!(
                "sweeps did not end within {SHUTDOWN:?} of the signal: {}; their rows are uncounted",
                stopped.sweeping
            );
        }
        ended.cancel();
        match timeout(left().clamp(RELEASE.0, RELEASE.1), self.election).await {
            Ok(result) => result.context("the election panicked")?,
            Err(_) => tracing::warn!("the lease could not be given back in time; it will run out"),
        }
        drop(timeout(left(), stopped.events.wait()).await);
        if stopped.uncounted > 0 {
            let objects = counted(stopped.uncounted, "object");
            bail!("rows of {objects} are swept and not counted in the status; the log names them");
        }
        Ok(())
    }
}

/// How a task ended. What a panic said may be data.
fn how(result: Result<std::io::Result<()>, JoinError>) -> String {
    match result {
        Ok(Ok(())) => "it should not have".into(),
        Ok(Err(error)) => error.to_string(),
        Err(error) if error.is_panic() => "a panic".into(),
        Err(_) => "it was cancelled".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tasks that do not end.
    fn tasks() -> Tasks {
        Tasks {
            signals: tokio::spawn(std::future::pending()),
            health: tokio::spawn(std::future::pending()),
            election: tokio::spawn(std::future::pending()),
            controller: tokio::spawn(std::future::pending()),
        }
    }

    async fn panics<T>() -> T {
        panic!("hunter2")
    }

    #[tokio::test]
    async fn whichever_task_ends_first_ends_the_process_and_is_named() {
        let bad = || std::io::Error::other("the socket is gone");
        let cases = [
            (
                "the health server ended: it should not have",
                Tasks { health: tokio::spawn(async { Ok(()) }), ..tasks() },
            ),
            (
                "the health server ended: the socket is gone",
                Tasks { health: tokio::spawn(async move { Err(bad()) }), ..tasks() },
            ),
            ("the health server ended: a panic", Tasks { health: tokio::spawn(panics()), ..tasks() }),
            ("listening for signals ended: a panic", Tasks { signals: tokio::spawn(panics()), ..tasks() }),
            ("the election ended: it should not have", Tasks { election: tokio::spawn(async {}), ..tasks() }),
            ("the election ended: a panic", Tasks { election: tokio::spawn(panics()), ..tasks() }),
            (
                "the controller ended: it should not have",
                Tasks { controller: tokio::spawn(async { ShutdownReport::default() }), ..tasks() },
            ),
            ("the controller ended: a panic", Tasks { controller: tokio::spawn(panics()), ..tasks() }),
        ];
        for (says, mut tasks) in cases {
            let ended = timeout(Duration::from_secs(5), tasks.until_stopped(&CancellationToken::new())).await;
            assert_eq!(ended.expect(says).unwrap_err().to_string(), says);
        }
    }

    /// A controller whose work ends with the token.
    fn works_until(token: &CancellationToken, stopped: ShutdownReport) -> JoinHandle<ShutdownReport> {
        let token = token.clone();
        tokio::spawn(async move {
            token.cancelled().await;
            stopped.events.close();
            stopped
        })
    }

    #[tokio::test]
    async fn a_signal_is_no_failure_even_if_tasks_end_with_it() {
        let stop = CancellationToken::new();
        let election = tokio::spawn(stop.clone().cancelled_owned());
        let mut tasks = Tasks { election, controller: works_until(&stop, ShutdownReport::default()), ..tasks() };
        assert!(timeout(Duration::from_millis(20), tasks.until_stopped(&stop)).await.is_err());
        stop.cancel();
        tokio::task::yield_now().await;
        tasks.until_stopped(&stop).await.unwrap();
    }

    #[tokio::test]
    async fn the_lease_is_released_after_the_sweeps() {
        let (ended, sweeping) = (CancellationToken::new(), CancellationToken::new());
        let controller = works_until(&sweeping, ShutdownReport::default());
        let election = tokio::spawn(ended.clone().cancelled_owned());
        let winding = Tasks { controller, election, ..tasks() }.drain(&ended);
        tokio::pin!(winding);
        assert!(timeout(Duration::from_millis(50), &mut winding).await.is_err());
        assert!(!ended.is_cancelled());
        sweeping.cancel();
        winding.await.unwrap();
        assert!(ended.is_cancelled());
    }

    #[tokio::test]
    async fn the_end_says_what_is_true_and_the_lease_is_kept_only_while_something_may_go_on() {
        let over = || {
            let over = CancellationToken::new();
            over.cancel();
            over
        };
        let ends_with = |stopped| works_until(&over(), stopped);
        let cases = [
            (
                ends_with(ShutdownReport { sweeping: 2, ..ShutdownReport::default() }),
                "sweeps did not end within 4.3s of the signal: 2",
                false,
            ),
            (
                ends_with(ShutdownReport { uncounted: 1, ..ShutdownReport::default() }),
                "rows of 1 object are swept and not counted",
                true,
            ),
            (tokio::spawn(std::future::pending()), "the controller did not end within 4.5s of the signal", false),
            (tokio::spawn(panics()), "the controller panicked", false),
        ];
        for (controller, says, released) in cases {
            let ended = CancellationToken::new();
            let election = tokio::spawn(ended.clone().cancelled_owned());
            let error = Tasks { controller, election, ..tasks() }.drain(&ended).await.unwrap_err().to_string();
            assert!(error.starts_with(says), "{error}");
            assert_eq!(ended.is_cancelled(), released, "{says}");
        }
    }
}
