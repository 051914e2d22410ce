//! Whose turn it is to sweep: so many at once on one database server, and so many at once in all. Preflights have turns
//! of their own.
//!
//! First comes the server's permit, then the connection, and only then one of the permits for all: servers that do not
//! answer, however many, hold none of those, and a slow one holds only its own share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// The permits of all sweeps, or of all preflights.
#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    most: usize,
    per_server: usize,
    servers: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// A permit for one server, and what server that is.
#[derive(Debug)]
pub struct ServerPermit {
    server: String,
    /// Given back when dropped.
    _permit: OwnedSemaphorePermit,
}

/// A permit, and whether it had to be waited for: then what was true before may no longer be.
#[derive(Debug)]
pub struct Granted<T> {
    pub permit: T,
    pub waited: bool,
}

impl Turns {
    /// So many at once in all, and so many on one server.
    pub fn new(all: usize, per_server: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), most: all, per_server, servers: Mutex::default() }
    }

    /// Waits for a permit of a server, in the order of arrival. Dropping the future leaves the queue.
    pub async fn on_server(&self, server: &str) -> Option<Granted<ServerPermit>> {
        let semaphore = self.semaphore(server);
        let Granted { permit, waited } = acquire(semaphore).await?;
        Some(Granted { permit: ServerPermit { server: server.to_owned(), _permit: permit }, waited })
    }

    /// Whether `permit` is one of the server's, or becomes one at once. Gives another back: who holds one and waits for
    /// another may wait for ever.
    pub fn take_now(&self, server: &str, permit: &mut Option<ServerPermit>) -> bool {
        if permit.as_ref().is_none_or(|permit| !permit.is_for(server)) {
            drop(permit.take());
            let taken = self.semaphore(server).try_acquire_owned().ok();
            *permit = taken.map(|permit| ServerPermit { server: server.to_owned(), _permit: permit });
        }
        permit.is_some()
    }

    /// Waits until `permit` is one of the server's: what was true before may no longer be. False: it is stopped before.
    pub async fn wait(&self, server: &str, permit: &mut Option<ServerPermit>, stop: &CancellationToken) -> bool {
        let granted = tokio::select! {
            granted = self.on_server(server) => granted,
            () = stop.cancelled() => None,
        };
        *permit = granted.map(|granted| granted.permit);
        permit.is_some()
    }

    /// Waits for one of the permits for all, in the order of arrival.
    pub async fn among_all(&self) -> Option<Granted<OwnedSemaphorePermit>> {
        acquire(self.all.clone()).await
    }

    /// How many of the permits for all are taken.
    pub fn taken(&self) -> usize {
        self.most.saturating_sub(self.all.available_permits())
    }

    fn semaphore(&self, server: &str) -> Arc<Semaphore> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever waits for or has a permit holds a share of its semaphore.
        servers.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
        servers.entry(server.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.per_server))).clone()
    }
}

impl ServerPermit {
    /// Whether it is one of that server's.
    pub fn is_for(&self, server: &str) -> bool {
        self.server == server
    }
}

/// Only a closed semaphore refuses, and nobody closes these.
async fn acquire(semaphore: Arc<Semaphore>) -> Option<Granted<OwnedSemaphorePermit>> {
    if let Ok(permit) = semaphore.clone().try_acquire_owned() {
        return Some(Granted { permit, waited: false });
    }
    semaphore.acquire_owned().await.ok().map(|permit| Granted { permit, waited: true })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn servers_do_not_wait_for_one_another_and_each_has_its_bound() {
        let turns = Turns::new(1, 2);
        let (first, _second) = (turns.on_server("a").await.unwrap(), turns.on_server("a").await.unwrap());
        assert!(!first.waited && first.permit.is_for("a") && !first.permit.is_for("b"));
        let third = turns.on_server("a");
        tokio::pin!(third);
        assert!(timeout(Duration::from_millis(10), &mut third).await.is_err());
        assert!(!turns.on_server("b").await.unwrap().waited);
        drop(first);
        assert!(third.await.unwrap().waited);
    }

    #[tokio::test]
    async fn a_permit_is_given_back_before_another_is_waited_for_and_a_stop_ends_the_wait() {
        let (turns, stop) = (Turns::new(1, 1), CancellationToken::new());
        let mut permit = None;
        assert!(turns.take_now("a", &mut permit));
        assert!(turns.take_now("a", &mut permit));
        let other = turns.on_server("b").await.unwrap();
        assert!(!turns.take_now("b", &mut permit) && permit.is_none());
        let waiting = async {
            assert!(turns.wait("b", &mut permit, &stop).await && permit.is_some_and(|permit| permit.is_for("b")));
        };
        tokio::pin!(waiting);
        assert!(timeout(Duration::from_millis(10), &mut waiting).await.is_err());
        assert!(!turns.on_server("a").await.unwrap().waited);
        drop(other);
        waiting.await;
        let (mut none, stopped) = (None, CancellationToken::new());
        stopped.cancel();
        assert!(turns.take_now("b", &mut none));
        let mut queued = None;
        assert!(!turns.take_now("b", &mut queued) && !turns.wait("b", &mut queued, &stopped).await && queued.is_none());
    }

    #[tokio::test]
    async fn nobody_overtakes_who_waits() {
        let (turns, stop) = (Turns::new(1, 1), CancellationToken::new());
        let (mut first, mut second, mut third) = (None, None, None);
        assert!(turns.take_now("a", &mut first));
        let waiting = turns.wait("a", &mut second, &stop);
        tokio::pin!(waiting);
        assert!(timeout(Duration::from_millis(10), &mut waiting).await.is_err());
        drop(first);
        assert!(!turns.take_now("a", &mut third));
        assert!(waiting.await);
    }

    #[tokio::test]
    async fn nothing_is_kept_of_a_server_that_nobody_sweeps() {
        let turns = Turns::new(1, 2);
        for server in 0..100 {
            drop(turns.on_server(&server.to_string()).await);
        }
        assert_eq!(turns.servers.lock().unwrap().len(), 1);
    }
}
