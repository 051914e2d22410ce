//! A bounded number of slots, shared among tenants: none that wants many, or keeps them for hours, shuts the others out.
//!
//! Slots go out in the order of arrival, but a tenant holds at most half of those that the others leave, rounded up. So
//! one tenant has half of them, two have a third each, and the last share is free for the next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The slots. Clones share them.
#[derive(Clone, Debug)]
pub struct FairSlots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    total: usize,
    /// How many wait.
    waiting: Arc<AtomicUsize>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    /// Those that hold a slot or wait for one.
    tenants: BTreeMap<String, Tenant>,
    /// Counts arrivals.
    arrivals: u64,
}

#[derive(Debug, Default)]
struct Tenant {
    held: usize,
    /// In the order of arrival.
    queue: VecDeque<(u64, oneshot::Sender<Slot>)>,
}

/// One slot, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    /// None after the slot was returned.
    shared: Option<Arc<Shared>>,
    tenant: String,
}

/// A slot, and whether it had to be waited for: then what was true before may no longer be.
#[derive(Debug)]
pub struct Acquired {
    pub slot: Slot,
    pub waited: bool,
}

impl FairSlots {
    /// Creates `total` slots.
    pub fn new(total: usize) -> Self {
        let (waiting, state) = (Arc::default(), Mutex::default());
        Self(Arc::new(Shared { total, waiting, state }))
    }

    /// Waits for a slot. Dropping the future leaves the queue.
    pub async fn acquire(&self, tenant: &str) -> Acquired {
        loop {
            let mut receiver = self.0.queue(tenant);
            if let Ok(slot) = receiver.try_recv() {
                return Acquired { slot, waited: false };
            }
            let _waits = WaitCount::new(&self.0.waiting);
            if let Ok(slot) = receiver.await {
                return Acquired { slot, waited: true };
            }
        }
    }

    /// A slot, unless it would have to be waited for.
    pub fn try_acquire(&self, tenant: &str) -> Option<Slot> {
        let slot = self.0.queue(tenant).try_recv().ok();
        if slot.is_none() {
            self.0.lock().clean();
        }
        slot
    }

    /// Whether the slot is one of these.
    pub fn is_origin_of(&self, slot: &Slot) -> bool {
        slot.shared.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, &self.0))
    }

    /// How many are in use.
    pub fn in_use(&self) -> usize {
        self.0.lock().used
    }

    /// The count of those who wait.
    pub fn waiting(&self) -> Arc<AtomicUsize> {
        self.0.waiting.clone()
    }

    /// Whether somebody has one of these slots, or shares them.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl State {
    /// Forgets those who left: at the ends of the queues, since what is between comes to an end.
    fn clean(&mut self) {
        for tenant in self.tenants.values_mut() {
            while tenant.queue.pop_front_if(|(_, sender)| sender.is_closed()).is_some() {}
            while tenant.queue.pop_back_if(|(_, sender)| sender.is_closed()).is_some() {}
        }
        self.tenants.retain(|_, tenant| tenant.held > 0 || !tenant.queue.is_empty());
    }
}

impl Shared {
    /// Joins the queue; what is free is handed out at once.
    fn queue(self: &Arc<Self>, tenant: &str) -> oneshot::Receiver<Slot> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        state.arrivals += 1;
        let arrival = state.arrivals;
        state.tenants.entry(tenant.to_owned()).or_default().queue.push_back((arrival, sender));
        self.grant(&mut state);
        receiver
    }

    /// Hands out what may be handed out.
    fn grant(self: &Arc<Self>, state: &mut State) {
        while let Some(free @ 1..) = self.total.checked_sub(state.used) {
            state.clean();
            let first = state.tenants.iter_mut().filter_map(|(name, tenant)| {
                let (arrival, _) = tenant.queue.front()?;
                (tenant.held < (free + tenant.held).div_ceil(2)).then_some((*arrival, name, tenant))
            });
            let Some((_, name, tenant)) = first.min_by_key(|(arrival, ..)| *arrival) else { return };
            let Some((_, sender)) = tenant.queue.pop_front() else { return };
            match sender.send(Slot { shared: Some(self.clone()), tenant: name.clone() }) {
                Ok(()) => (tenant.held, state.used) = (tenant.held + 1, state.used + 1),
                // It left the queue just now. Its slot was never counted.
                Err(mut slot) => drop(slot.shared.take()),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        let mut state = shared.lock();
        state.used = state.used.saturating_sub(1);
        if let Some(tenant) = state.tenants.get_mut(&self.tenant) {
            tenant.held = tenant.held.saturating_sub(1);
        }
        shared.grant(&mut state);
    }
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

    fn take(slots: &FairSlots, tenant: &str, wanted: usize) -> Vec<Slot> {
        (0..wanted).map_while(|_| slots.try_acquire(tenant)).collect()
    }

    #[test]
    fn a_tenant_holds_at_most_half_of_what_the_others_leave() {
        for (total, held) in [(1, [1, 0, 0, 0]), (3, [2, 1, 0, 0]), (5, [3, 1, 1, 0]), (20, [10, 5, 3, 1])] {
            let slots = FairSlots::new(total);
            let all = ["a", "b", "c", "d"].map(|tenant| take(&slots, tenant, 100));
            assert_eq!(all.each_ref().map(Vec::len), held, "of {total}");
        }
    }

    #[test]
    fn tenants_that_want_all_come_to_equal_shares_and_leave_one() {
        for tenants in 1..=4 {
            let slots = FairSlots::new(20);
            let mut held: Vec<Vec<Slot>> = (0..tenants).map(|_| vec![]).collect();
            for turn in 0..1000 {
                let name = turn % tenants;
                held[name].pop();
                held[name].extend(take(&slots, &name.to_string(), 100));
            }
            let counts: Vec<_> = held.iter().map(Vec::len).collect();
            let share = 20 / (tenants + 1);
            assert!(counts.iter().all(|count| count.abs_diff(share) <= 1), "{counts:?}");
            assert!(slots.try_acquire("new").is_some());
        }
    }

    #[tokio::test]
    async fn slots_go_out_in_the_order_of_arrival_and_who_left_gets_none() {
        let slots = FairSlots::new(1);
        let first = slots.acquire("a").await;
        assert!(!first.waited);
        let (sender, mut served) = tokio::sync::mpsc::unbounded_channel();
        for name in ["b", "a", "left", "c", "a"] {
            let waits = slots.clone();
            let sender = sender.clone();
            let task = tokio::spawn(async move {
                let acquired = waits.acquire(name).await;
                assert!(acquired.waited);
                sender.send(name).unwrap();
            });
            tokio::task::yield_now().await;
            if name == "left" {
                task.abort();
                assert!(task.await.unwrap_err().is_cancelled());
            }
        }
        assert_eq!((slots.waiting().load(Ordering::Relaxed), slots.in_use()), (4, 1));
        assert!(slots.try_acquire("d").is_none(), "nobody overtakes who waits");
        drop(first);
        for name in ["b", "a", "c", "a"] {
            assert_eq!(timeout(Duration::from_secs(1), served.recv()).await.unwrap(), Some(name));
        }
        assert_eq!((slots.waiting().load(Ordering::Relaxed), slots.in_use()), (0, 0));
    }

    #[test]
    fn nothing_is_kept_of_a_tenant_without_slots() {
        let slots = FairSlots::new(1);
        let held = slots.try_acquire("a");
        for tenant in 0..100 {
            assert!(slots.try_acquire(&tenant.to_string()).is_none());
        }
        assert_eq!(slots.0.lock().tenants.len(), 1);
        drop(held);
        drop(slots.try_acquire("b"));
        assert!(slots.0.lock().tenants.values().all(|tenant| tenant.held == 0 && tenant.queue.is_empty()));
    }
}
