//! Per-object state between reconciles. The watch may still deliver an old status.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};
use kube::ResourceExt;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::reflector::Store;

use super::model::{AttemptResult, ParsedObject};
use crate::api::{AuditLogSweeper, Sweeper, ValidSpec};
use crate::telemetry::metrics::Counts;

/// What is remembered of one object.
#[derive(Clone, Debug, Default)]
pub struct CacheEntry {
    /// No sweep before this, whatever the status says. Set before a sweep starts.
    pub not_before: Option<DateTime<Utc>>,
    /// A result that could not be published yet.
    pub pending: Option<Arc<AttemptResult>>,
    /// What was looked at by the last whole preflight, and when.
    pub checked: Option<PreflightInputs>,
    /// The last spec that was valid.
    pub valid: Option<ValidSpec>,
    /// The database server that it has to queue for, and whether for a preflight there.
    pub queue: Option<Queue>,
    /// Reconciles that failed in a row, for the backoff.
    pub failed_reconciles: u32,
    /// What was done for it since this process leads.
    pub counts: Counts,
}

/// A queue for slots of one database server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Queue {
    pub server: String,
    pub kind: Kind,
}

/// What slots are for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Preflight,
    Sweep,
}

/// What a preflight was about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PreflightInputs {
    /// Of the object's spec.
    pub generation: i64,
    /// The resourceVersions of its Secrets.
    pub secrets: Vec<String>,
    /// When.
    pub time: DateTime<Utc>,
}

/// A preflight repeats at this interval, because a change of the schema sends no event.
const CHECK_AGAIN: TimeDelta = TimeDelta::hours(1);

impl CacheEntry {
    /// Whether a sweep now should begin with a whole preflight: something changed since the last one, or it found
    /// something, or it was long ago. `ready`: the condition SchemaReady is True.
    pub fn needs_preflight(&self, ready: bool, generation: i64, secrets: &[String], now: DateTime<Utc>) -> bool {
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

    /// Returns the object if its spec is valid. A spec equal to the last valid one is not validated again. The generation
    /// cannot tell, because a new default of the CRD changes only the spec.
    ///
    /// # Errors
    /// What is wrong with the object.
    pub fn validate(&self, object: &ParsedObject) -> Result<Sweeper, Box<InvalidObject>> {
        let AuditLogSweeper { metadata, spec, status } =
            object.0.as_ref().map_err(|invalid| Box::new(invalid.clone()))?;
        let uid = metadata.uid.as_deref().unwrap_or_default();
        let known = self.lock().get(uid).and_then(|entry| entry.valid.clone()).filter(|valid| **valid == *spec);
        let metadata = metadata.clone();
        let spec = match known.map_or_else(|| ValidSpec::new(spec.clone()), Ok) {
            Ok(spec) => spec,
            Err(broken) => return Err(Box::new(InvalidObject { error: broken.join("; "), metadata })),
        };
        self.change(uid, |entry| entry.valid = Some(spec.clone()));
        Ok(Sweeper { metadata, spec, status: status.clone().unwrap_or_default() })
    }

    /// Clears due times and counts when a term begins. Another replica may have swept, so only the status is reliable.
    /// Restored counts would look like new rows. Pending sweep results stay, and are published first.
    pub fn start_term(&self) {
        for entry in self.lock().values_mut() {
            (entry.not_before, entry.counts) = (None, Counts::default());
            // Only attempts count something; all else may be outdated, and the leader says it anew.
            entry.pending.take_if(|pending| pending.sweep().is_none());
        }
    }

    /// What could not be published yet.
    pub fn pending(&self) -> Vec<Arc<AttemptResult>> {
        self.lock().values().filter_map(|entry| entry.pending.clone()).collect()
    }

    /// Forgets objects that are gone, now and then.
    pub fn retain(&self, stores: &[Store<ParsedObject>]) {
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
            entry.failed_reconciles = 2;
            entry.counts.rows_timed_out = 3;
        });
        cache.start_term();
        let entry = cache.get("uid");
        assert_eq!((entry.not_before, entry.counts, entry.failed_reconciles), (None, Counts::default(), 2));
    }

    #[test]
    fn that_one_spec_is_valid_says_nothing_of_another() {
        let object = |uid: &str, timeout: &str| -> ParsedObject {
            serde_json::from_value(serde_json::json!({
                "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app", "uid": uid },
                "spec": { "database": { "secretRef": { "name": "db" } }, "timeout": timeout },
            }))
            .unwrap()
        };
        let cache = ObjectCache::default();
        for _ in 0..2 {
            assert_eq!(cache.validate(&object("1", "1h")).unwrap().spec.timeout.to_string(), "1h");
            for uid in ["1", "2"] {
                let invalid = cache.validate(&object(uid, "0s")).unwrap_err();
                assert!(invalid.error.starts_with("spec.timeout") && invalid.metadata.uid.as_deref() == Some(uid));
            }
        }
    }

    #[test]
    fn a_preflight_comes_with_every_change_and_about_every_hour() {
        let at = |second| DateTime::from_timestamp(second, 0).unwrap();
        let secrets = ["1".to_owned(), "2".to_owned()];
        let mut entry = CacheEntry::default();
        assert!(entry.needs_preflight(true, 1, &secrets, at(0)));
        entry.checked = Some(PreflightInputs { generation: 1, secrets: secrets.to_vec(), time: at(0) });
        assert!(!entry.needs_preflight(true, 1, &secrets, at(3599)));
        assert!(entry.needs_preflight(true, 1, &secrets, at(3600)));
        assert!(entry.needs_preflight(true, 1, &secrets, at(-3600)), "a clock that jumped");
        assert!(entry.needs_preflight(true, 2, &secrets, at(1)));
        assert!(entry.needs_preflight(true, 1, &secrets[..1], at(1)));
        assert!(entry.needs_preflight(false, 1, &secrets, at(1)), "what it found may be fixed by now");
    }
}
