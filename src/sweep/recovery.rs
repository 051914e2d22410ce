//! What a sweep does about an error of a batch, by the server's SQLSTATE. `batch_planner` says how often.

use crate::api::Reason;
use crate::database::Error;

/// What a sweep does about an error of a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Recovery {
    /// It lost against another transaction: try again at once, a few times.
    Again,
    /// The server was too busy: take fewer rows.
    Smaller,
    /// The table is locked, or a row: if EXPLAIN waits too, it is the table. Then wait a little, a few times.
    Later,
    /// A row was refused, unless EXPLAIN refuses the statement too: find the row.
    Bisect,
    /// This attempt is over.
    End,
}

impl From<&Error> for Recovery {
    fn from(error: &Error) -> Self {
        let Error::Server(server) = error else { return Self::End };
        match server.sqlstate.as_str() {
            _ if server.fatal => Self::End,
            "40001" | "40P01" | "26000" | "42P05" => Self::Again,
            "57014" | "53200" => Self::Smaller,
            "55P03" => Self::Later,
            // The server as a whole cannot: it is full, read-only or damaged.
            "25006" => Self::End,
            code if ["53", "54", "58", "XX"].iter().any(|class| code.starts_with(class)) => Self::End,
            _ if error.reason() == Reason::NotPrimary => Self::End,
            _ => Self::Bisect,
        }
    }
}
