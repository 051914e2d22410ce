//! Limits how many sweeps run at once, on one database server and in all. Preflights have a limiter of their own.
//!
//! A sweep acquires a permit of its server, connects, and then acquires one of the permits for all. Servers that do not
//! answer hold none of those. A slow server holds only its share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::sweep::throttle::Peers;

/// The permits of all sweeps, or of all preflights.
#[derive(Debug)]
pub struct Limiter {
    all: Arc<Semaphore>,
    most: usize,
    per_server: usize,
    /// How many wait for one of the permits for all.
    waiting: Arc<AtomicUsize>,
    servers: Mutex<HashMap<String, Server>>,
}

/// What those on one server share.
#[derive(Clone, Debug)]
struct Server {
    semaphore: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    /// Transactions that sweeps started there.
    started: Arc<AtomicU64>,
}

/// A permit, and whether it had to be waited for: then what was true before may no longer be.
#[derive(Debug)]
pub struct Acquired {
    pub permit: OwnedSemaphorePermit,
    pub waited: bool,
}

impl Limiter {
    /// So many at once in all, and so many on one server.
    pub fn new(all: usize, per_server: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all)),
            most: all,
            per_server,
            waiting: Arc::default(),
            servers: Mutex::default(),
        }
    }

    /// WaitCount for a permit of a server, in the order of arrival. Dropping the future leaves the queue.
    pub async fn acquire_server(&self, server: &str) -> Option<OwnedSemaphorePermit> {
        let Server { semaphore, waiting, .. } = self.server(server);
        acquire(semaphore, &waiting).await.map(|acquired| acquired.permit)
    }

    /// Keeps the permit if it belongs to this server; otherwise tries to replace it without waiting. The old permit is
    /// released first, to avoid deadlock.
    pub fn try_acquire_server(&self, server: &str, permit: &mut Option<OwnedSemaphorePermit>) -> bool {
        let semaphore = self.server(server).semaphore;
        if permit.as_ref().is_none_or(|permit| !Arc::ptr_eq(permit.semaphore(), &semaphore)) {
            drop(permit.take());
            *permit = semaphore.try_acquire_owned().ok();
        }
        permit.is_some()
    }

    /// WaitCount for one of the permits for all, in the order of arrival.
    pub async fn acquire_global(&self) -> Option<Acquired> {
        acquire(self.all.clone(), &self.waiting).await
    }

    /// Returns the counters that sweeps on one server share. The caller must hold a permit of it; otherwise the entry is
    /// dropped.
    pub fn peers(&self, server: &str) -> Peers {
        let Server { waiting, started, .. } = self.server(server);
        Peers::new(started, waiting, self.waiting.clone())
    }

    /// How many of the permits for all are in use.
    pub fn in_use(&self) -> usize {
        self.most.saturating_sub(self.all.available_permits())
    }

    fn server(&self, server: &str) -> Server {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever waits for or has a permit holds a share of its semaphore.
        servers.retain(|_, server| Arc::strong_count(&server.semaphore) > 1);
        let new = || Server {
            semaphore: Arc::new(Semaphore::new(self.per_server)),
            waiting: Arc::default(),
            started: Arc::default(),
        };
        servers.entry(server.to_owned()).or_insert_with(new).clone()
    }
}

/// Returns None only for a closed semaphore. These are never closed.
async fn acquire(semaphore: Arc<Semaphore>, waiting: &AtomicUsize) -> Option<Acquired> {
    if let Ok(permit) = semaphore.clone().try_acquire_owned() {
        return Some(Acquired { permit, waited: false });
    }
    let _waits = WaitCount::new(waiting);
    semaphore.acquire_owned().await.ok().map(|permit| Acquired { permit, waited: true })
}

/// Somebody waits, until this is dropped.
struct WaitCount<'a>(&'a AtomicUsize);

impl<'a> WaitCount<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for WaitCount<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn servers_do_not_wait_for_one_another_and_each_has_its_bound() {
        let limiter = Limiter::new(1, 2);
        let (first, _second) = (limiter.acquire_server("a").await.unwrap(), limiter.acquire_server("a").await.unwrap());
        let third = limiter.acquire_server("a");
        tokio::pin!(third);
        assert!(timeout(Duration::from_millis(10), &mut third).await.is_err());
        assert!(limiter.acquire_server("b").await.is_some());
        drop(first);
        assert!(third.await.is_some());
    }

    #[tokio::test]
    async fn a_permit_of_another_server_or_kind_is_given_back() {
        let (sweeps, preflights) = (Limiter::new(1, 1), Limiter::new(1, 1));
        let mut permit = None;
        assert!(sweeps.try_acquire_server("a", &mut permit));
        assert!(sweeps.try_acquire_server("a", &mut permit), "it is the server's already");
        let _other = sweeps.acquire_server("b").await.unwrap();
        assert!(!sweeps.try_acquire_server("b", &mut permit) && permit.is_none());
        assert!(sweeps.try_acquire_server("a", &mut permit), "the first was given back");
        assert!(preflights.try_acquire_server("a", &mut permit));
        assert!(timeout(Duration::from_secs(1), sweeps.acquire_server("a")).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_sweep_knows_that_somebody_waits_and_what_those_beside_it_began() {
        let limiter = Limiter::new(1, 1);
        let (_here, _there) = (limiter.acquire_server("a").await.unwrap(), limiter.acquire_server("b").await.unwrap());
        let [here, beside, there] = ["a", "a", "b"].map(|server| limiter.peers(server));
        let all = || [&here, &beside, &there].map(Peers::are_waiting);
        beside.start();
        assert_eq!(([here.start(), there.start()], all()), ([2, 1], [false; 3]));
        for server in [Some("a"), None] {
            let _last = limiter.all.clone().try_acquire_owned();
            let waiting = async {
                match server {
                    Some(server) => drop(limiter.acquire_server(server).await),
                    None => drop(limiter.acquire_global().await),
                }
            };
            assert!(
                timeout(Duration::from_millis(10), async {
                    tokio::join!(waiting, async { assert_eq!(all(), [true, true, server.is_none()]) })
                })
                .await
                .is_err()
            );
            assert_eq!(all(), [false; 3], "who gave up waits no longer");
        }
    }

    #[tokio::test]
    async fn nobody_overtakes_who_waits() {
        let limiter = Limiter::new(1, 1);
        let (mut first, mut third) = (None, None);
        assert!(limiter.try_acquire_server("a", &mut first));
        let waiting = limiter.acquire_server("a");
        tokio::pin!(waiting);
        assert!(timeout(Duration::from_millis(10), &mut waiting).await.is_err());
        drop(first);
        assert!(!limiter.try_acquire_server("a", &mut third));
        assert!(waiting.await.is_some());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_a_server_that_nobody_sweeps() {
        let limiter = Limiter::new(1, 2);
        for server in 0..100 {
            drop(limiter.acquire_server(&server.to_string()).await);
        }
        assert_eq!(limiter.servers.lock().unwrap().len(), 1);
    }
}
