//! What the process remembers of each object between reconciles: the watch may show an old status.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};
use kube::ResourceExt;
use kube::runtime::reflector::Store;

use super::model::{Fetched, Pending};
use crate::api::{AuditLogSweeperSpec, validate};
use crate::telemetry::metrics::Counts;

/// What is remembered of one object.
#[derive(Clone, Debug, Default)]
pub struct CacheEntry {
    /// No sweep before this, whatever the status says. Set before a sweep starts.
    pub not_before: Option<DateTime<Utc>>,
    /// An outcome that could not be published yet.
    pub pending: Option<Arc<Pending>>,
    /// What was looked at by the last whole preflight, and when.
    pub checked: Option<Seen>,
    /// The last spec that was judged and found to break no rule.
    pub valid: Option<Arc<AuditLogSweeperSpec>>,
    /// API requests that failed in a row, for the backoff.
    pub api_failures: u32,
    /// What was done for it since this process leads.
    pub counts: Counts,
}

/// What a preflight was about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Of the object's spec.
    pub generation: i64,
    /// The resourceVersions of its Secrets.
    pub secrets: Vec<String>,
    /// When.
    pub time: DateTime<Utc>,
}

/// A preflight is worth repeating about this often, for what changes in the database without a word to us.
const CHECK_AGAIN: TimeDelta = TimeDelta::hours(1);

impl CacheEntry {
    /// Whether a sweep now should begin with a whole preflight: something changed since the last one, or it found
    /// something, or it was long ago. `ready`: the condition SchemaReady is True.
    pub fn needs_check(&self, ready: bool, generation: i64, secrets: &[String], now: DateTime<Utc>) -> bool {
        !ready
            || self.checked.as_ref().is_none_or(|seen| {
                seen.generation != generation || seen.secrets != secrets || (now - seen.time).abs() >= CHECK_AGAIN
            })
    }
}

/// The memory of all objects, by UID.
#[derive(Debug, Default)]
pub struct ObjectCache(Mutex<HashMap<String, CacheEntry>>);

impl ObjectCache {
    /// A copy of what is remembered.
    pub fn get(&self, uid: &str) -> CacheEntry {
        self.lock().get(uid).cloned().unwrap_or_default()
    }

    /// Changes what is remembered.
    pub fn change<T>(&self, uid: &str, change: impl FnOnce(&mut CacheEntry) -> T) -> T {
        change(self.lock().entry(uid.to_owned()).or_default())
    }

    /// Every rule of the CRD that a spec breaks. A spec that breaks none is judged once: that takes longer than all else
    /// of a reconcile. Told by the spec and not by its generation: a default of the CRD changes the one without the other.
    pub fn broken_rules(&self, uid: &str, spec: &AuditLogSweeperSpec) -> Vec<String> {
        if self.lock().get(uid).is_some_and(|entry| entry.valid.as_deref() == Some(spec)) {
            return vec![];
        }
        let broken = validate::judge_spec(spec);
        if broken.is_empty() {
            self.change(uid, |entry| entry.valid = Some(Arc::new(spec.clone())));
        }
        broken
    }

    /// Forgets when sweeps are due: another replica may have led meanwhile, and only the statuses know what it did.
    /// Counts begin anew, since series that come back with an old count would look like new rows. An outcome that waits
    /// to be published stays, and is published before anything else.
    pub fn start_term(&self) {
        for entry in self.lock().values_mut() {
            (entry.not_before, entry.counts) = (None, Counts::default());
            // Only attempts count something; all else may be outdated, and the leader says it anew.
            entry.pending.take_if(|pending| pending.update.start().is_none());
        }
    }

    /// What could not be published yet.
    pub fn pending(&self) -> Vec<Arc<Pending>> {
        self.lock().values().filter_map(|entry| entry.pending.clone()).collect()
    }

    /// Forgets objects that are gone, now and then.
    pub fn retain(&self, stores: &[Store<Fetched>]) {
        let mut cache = self.lock();
        if cache.len() > stores.iter().map(Store::len).sum::<usize>() * 2 + 16 {
            let live: HashSet<_> = stores.iter().flat_map(Store::state).filter_map(|object| object.uid()).collect();
            cache.retain(|uid, _| live.contains(uid));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, CacheEntry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_begins_without_the_counts_and_schedules_of_the_last() {
        let cache = ObjectCache::default();
        cache.change("uid", |entry| {
            entry.not_before = DateTime::from_timestamp(1, 0);
            entry.api_failures = 2;
            entry.counts.rows_timed_out = 3;
        });
        cache.start_term();
        let entry = cache.get("uid");
        assert_eq!((entry.not_before, entry.counts, entry.api_failures), (None, Counts::default(), 2));
    }

    #[test]
    fn a_spec_that_was_found_well_is_no_word_for_another() {
        let spec = |timeout| -> AuditLogSweeperSpec {
            let spec = serde_json::json!({ "database": { "secretRef": { "name": "db" } }, "timeout": timeout });
            serde_json::from_value(spec).unwrap()
        };
        let cache = ObjectCache::default();
        for _ in 0..2 {
            assert_eq!(cache.broken_rules("1", &spec("1h")), [""; 0]);
            assert_eq!(cache.broken_rules("1", &spec("0s")).len(), 1);
            assert_eq!(cache.broken_rules("2", &spec("0s")).len(), 1);
        }
    }

    #[test]
    fn a_preflight_comes_with_every_change_and_about_every_hour() {
        let at = |second| DateTime::from_timestamp(second, 0).unwrap();
        let secrets = ["1".to_owned(), "2".to_owned()];
        let mut entry = CacheEntry::default();
        assert!(entry.needs_check(true, 1, &secrets, at(0)));
        entry.checked = Some(Seen { generation: 1, secrets: secrets.to_vec(), time: at(0) });
        assert!(!entry.needs_check(true, 1, &secrets, at(3599)));
        assert!(entry.needs_check(true, 1, &secrets, at(3600)));
        assert!(entry.needs_check(true, 1, &secrets, at(-3600)), "a clock that jumped");
        assert!(entry.needs_check(true, 2, &secrets, at(1)));
        assert!(entry.needs_check(true, 1, &secrets[..1], at(1)));
        assert!(entry.needs_check(false, 1, &secrets, at(1)), "what it found may be fixed by now");
    }
}
