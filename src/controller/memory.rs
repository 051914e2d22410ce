//! What the process remembers of each object between reconciles: the watch may show an old status.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::Store;

use super::outcome::{Subject, Update};
use crate::api::AuditLogSweeper;

/// What is remembered of one object.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// No sweep before this, whatever the status says. Set before a sweep starts.
    pub next: Option<DateTime<Utc>>,
    /// An outcome that could not be published yet.
    pub pending: Option<Arc<(Subject, Update)>>,
    /// API requests that failed in a row, for the backoff.
    pub api_failures: u32,
}

/// The memory of all objects, by UID.
#[derive(Debug, Default)]
pub struct Memories(Mutex<HashMap<String, Memory>>);

impl Memories {
    /// A copy of what is remembered.
    pub fn get(&self, uid: &str) -> Memory {
        self.lock().get(uid).cloned().unwrap_or_default()
    }

    /// Changes what is remembered.
    pub fn change<T>(&self, uid: &str, change: impl FnOnce(&mut Memory) -> T) -> T {
        change(self.lock().entry(uid.to_owned()).or_default())
    }

    /// Forgets when sweeps are due: another replica may have led meanwhile, and only the statuses know what it did.
    /// An outcome that waits to be published stays, and is published before anything else.
    pub fn forget_schedules(&self) {
        self.lock().values_mut().for_each(|memory| memory.next = None);
    }

    /// Forgets objects that are gone, now and then.
    pub fn retain(&self, stores: &[Store<DeserializeGuard<AuditLogSweeper>>]) {
        let mut memories = self.lock();
        if memories.len() > stores.iter().map(Store::len).sum::<usize>() * 2 + 16 {
            let live: HashSet<_> = stores.iter().flat_map(Store::state).filter_map(|object| object.uid()).collect();
            memories.retain(|uid, _| live.contains(uid));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
