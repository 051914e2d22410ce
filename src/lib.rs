//! AuditLogSweeper: completes audit log rows that a crash left open, on a schedule, for any PostgreSQL table.
//!
//! The modules in the order in which data flows: a spec ([`api`]) is due at some time ([`schedule`]); [`controller`]
//! fetches what it needs ([`credentials`]), lets the [`sweep`] run, and publishes the outcome; [`telemetry`] shows
//! that the process lives; [`cli`] is the way in, with or without a cluster.

pub mod api;
pub mod cli;
pub mod controller;
pub mod credentials;
pub mod database;
pub mod preflight;
pub mod schedule;
pub mod sweep;
pub mod telemetry;
