//! The tests that need real parts: one binary, so that they share one control plane and one PostgreSQL server.

// All of it is tests; clippy.toml allows these only in functions that are marked as such.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod api_answers;
mod api_faults;
mod chaos;
mod chart;
mod cli;
mod conditions;
mod controller;
mod database;
mod docs;
mod fixtures;
mod isolation;
mod layout;
mod leaving;
mod loose;
mod metrics;
mod outages;
mod plugin;
mod prometheus;
mod readiness;
mod replicas;
mod requests;
mod samples;
mod scope;
mod specs;
mod status_writes;
mod stopping;
