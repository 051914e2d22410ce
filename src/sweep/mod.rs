//! The sweep: everything that the database sees of it. Knows nothing of Kubernetes.
//!
//! `plan` turns a spec into quoted SQL parts. `start` asks for the cutoff and for what the table is like, `statement` writes
//! the rest of the SQL, both under the settings of `transaction`. `execute` drives the batches. `batch_planner` decides
//! their size and what to do when one fails, with `throttle` for while others write and `recovery` for errors. `report` is
//! what comes out. Every batch is its own short transaction: what is done stays done, and is counted, even when a later
//! batch fails.

pub mod batch_planner;
pub mod execute;
pub mod open_index;
pub mod plan;
pub mod recovery;
pub mod report;
pub mod start;
pub mod statement;
pub mod throttle;
pub mod transaction;

pub use execute::{Connected, Job, run, sweep};
pub use plan::Plan;
pub use report::Report;
