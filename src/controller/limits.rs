//! Limits how many sweeps run at once, on one database server and in all. Preflights have a limiter of their own.
//!
//! A sweep acquires a slot of its server, connects, and then acquires one of the slots for all. Servers that do not
//! answer hold none of those. The tenants that share the slots are the namespaces.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use super::fair_slots::{Acquired, FairSlots, Slot};
use crate::sweep::throttle::Peers;

/// The slots of all sweeps, or of all preflights.
#[derive(Debug)]
pub struct Limiter {
    all: FairSlots,
    per_server: usize,
    servers: Mutex<HashMap<String, Server>>,
}

/// What those on one server share.
#[derive(Clone, Debug)]
struct Server {
    slots: FairSlots,
    /// Transactions that sweeps started there.
    started: Arc<AtomicU64>,
}

impl Limiter {
    /// So many at once in all, and so many on one server.
    pub fn new(all: usize, per_server: usize) -> Self {
        Self { all: FairSlots::new(all), per_server, servers: Mutex::default() }
    }

    /// Waits for a slot of a server.
    pub async fn acquire_server(&self, server: &str, namespace: &str) -> Slot {
        self.server(server).slots.acquire(namespace).await.slot
    }

    /// Keeps the slot if it belongs to this server; otherwise tries to replace it without waiting. The old slot is
    /// released first, to avoid deadlock.
    pub fn try_acquire_server(&self, server: &str, namespace: &str, slot: &mut Option<Slot>) -> bool {
        let slots = self.server(server).slots;
        if slot.as_ref().is_none_or(|slot| !slots.is_origin_of(slot)) {
            drop(slot.take());
            *slot = slots.try_acquire(namespace);
        }
        slot.is_some()
    }

    /// Waits for one of the slots for all.
    pub async fn acquire_global(&self, namespace: &str) -> Acquired {
        self.all.acquire(namespace).await
    }

    /// Returns the counters that sweeps on one server share. The caller must hold a slot of it; otherwise the entry is
    /// dropped.
    pub fn peers(&self, server: &str) -> Peers {
        let Server { slots, started } = self.server(server);
        Peers::new(started, slots.waiting(), self.all.waiting())
    }

    /// How many of the slots for all are in use.
    pub fn in_use(&self) -> usize {
        self.all.in_use()
    }

    fn server(&self, server: &str) -> Server {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        // Each slot, and each wait for one, holds a share of them.
        servers.retain(|_, server| server.slots.is_shared());
        let new = || Server { slots: FairSlots::new(self.per_server), started: Arc::default() };
        servers.entry(server.to_owned()).or_insert_with(new).clone()
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
        let (first, _second) = (limiter.acquire_server("a", "n").await, limiter.acquire_server("a", "m").await);
        let third = limiter.acquire_server("a", "n");
        tokio::pin!(third);
        assert!(timeout(Duration::from_millis(10), &mut third).await.is_err());
        drop(limiter.acquire_server("b", "n").await);
        drop(first);
        third.await;
    }

    #[tokio::test]
    async fn a_slot_of_another_server_or_kind_is_given_back() {
        let (sweeps, preflights) = (Limiter::new(1, 1), Limiter::new(1, 1));
        let mut slot = None;
        assert!(sweeps.try_acquire_server("a", "n", &mut slot));
        assert!(sweeps.try_acquire_server("a", "n", &mut slot), "it is the server's already");
        let _other = sweeps.acquire_server("b", "n").await;
        assert!(!sweeps.try_acquire_server("b", "n", &mut slot) && slot.is_none());
        assert!(sweeps.try_acquire_server("a", "n", &mut slot), "the first was given back");
        assert!(preflights.try_acquire_server("a", "n", &mut slot));
        timeout(Duration::from_secs(1), sweeps.acquire_server("a", "n")).await.unwrap();
    }

    #[tokio::test]
    async fn a_sweep_knows_that_somebody_waits_and_what_those_beside_it_began() {
        let limiter = Limiter::new(1, 1);
        let (_here, _there) = (limiter.acquire_server("a", "n").await, limiter.acquire_server("b", "n").await);
        let [here, beside, there] = ["a", "a", "b"].map(|server| limiter.peers(server));
        let all = || [&here, &beside, &there].map(Peers::are_waiting);
        beside.start();
        assert_eq!(([here.start(), there.start()], all()), ([2, 1], [false; 3]));
        for server in [Some("a"), None] {
            let _last = limiter.all.try_acquire("n");
            let waiting = async {
                match server {
                    Some(server) => drop(limiter.acquire_server(server, "n").await),
                    None => drop(limiter.acquire_global("n").await),
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
    async fn nothing_is_kept_of_a_server_that_nobody_sweeps() {
        let limiter = Limiter::new(1, 2);
        for server in 0..100 {
            drop(limiter.acquire_server(&server.to_string(), "n").await);
        }
        assert_eq!(limiter.servers.lock().unwrap().len(), 1);
    }
}
