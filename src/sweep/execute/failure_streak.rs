//! What went wrong in a sweep since something last went well, and when that is too much.

use crate::database::Error;

/// So many rows refused in a row for one cause, and none that went well between: it is not the rows.
pub(super) const ALIKE: i64 = 8;

/// So many rows are stepped over in one sweep.
const REFUSED: i64 = 100;

/// What went wrong since the last batch that went well.
#[derive(Default)]
pub(super) struct FailureStreak {
    pub conflicts: u32,
    pub locked: u32,
    pub skipped: i64,
    /// The kind of the last refusals, and how many of them came in a row.
    alike: Option<(String, i64)>,
}

impl FailureStreak {
    /// Takes a refusal in; the error with which to end, if it was one too many.
    pub fn too_many(&mut self, error: Error, refused: i64) -> Option<Error> {
        let kind = error.kind();
        let rows = self.alike.take().filter(|(last, _)| *last == kind).map_or(1, |(_, rows)| rows + 1);
        self.alike = Some((kind, rows));
        let cause = Box::new(error);
        if rows >= ALIKE {
            Some(Error::AllRefused { rows, cause })
        } else if refused >= REFUSED {
            Some(Error::ManyRefused { rows: refused, cause })
        } else {
            None
        }
    }
}
