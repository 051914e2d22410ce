//! Looks whether a sweep could run, without running it: asks (`catalog`), judges (`judge`, `columns`, `types`, `index`, `rights`), tries the values
//! (`values`) and says what fixes what it found (`finding`, `fix`).

mod batch;
mod catalog;
mod columns;
mod finding;
mod fix;
mod index;
mod json;
mod judge;
mod rights;
mod types;
mod values;

use std::time::Duration;

pub use finding::{Finding, Fix, Part, PreflightReport, RunAs, Severity, Subject};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_postgres::SimpleQueryMessage;

use crate::api::status::Backlog;
use crate::api::{Class, Reason};
use crate::database::error::Step;
use crate::database::session::{last_row, text};
use crate::database::{Error, Session, Target};
use crate::sweep::start::Start;
use crate::sweep::statement::Locking;
use crate::sweep::{Plan, start, statement, transaction};

/// Reaching the database and planning a statement takes far less than this.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects and looks at everything that a sweep rests on, and counts what the first one would take. Changes nothing and locks
/// no row.
///
/// # Errors
/// When the database cannot be reached or stops answering: what is wrong with the table is no error but a finding.
pub async fn check(plan: &Plan, target: &Target) -> Result<PreflightReport, Error> {
    let session = target.connect(plan.deadline).await?;
    let mut checked = look(&session, plan).await;
    if let Ok(checked) = &mut checked
        && checked.blocking().is_none()
    {
        // What takes too long to count is not counted.
        checked.first_sweep = first_sweep(&session, plan).await.ok();
    }
    session.close().await;
    checked
}

/// The stale rows, up to one more than a sweep takes.
async fn first_sweep(session: &Session, plan: &Plan) -> Result<Backlog, Error> {
    let start = ask_start(session, plan).await?;
    let limit = plan.statement_timeout;
    let sql = statement::backlog(plan, &start, plan.limit, limit);
    let answer = session.query(Step::Backlog, &sql, limit + TIMEOUT).await?;
    statement::read_backlog(&answer, plan.limit).ok_or(Error::Answer("the count of the backlog"))
}

/// The same on an open connection, which a sweep may use afterwards.
///
/// # Errors
/// When the database stops answering.
pub async fn look(session: &Session, plan: &Plan) -> Result<PreflightReport, Error> {
    let checked = ask_all(session, plan).await;
    if checked.is_err() {
        session.rollback().await;
    }
    checked
}

async fn ask_all(session: &Session, plan: &Plan) -> Result<PreflightReport, Error> {
    let mut checked = PreflightReport::default();
    let server: catalog::Server = ask(session, &catalog::server(timeout(plan))).await?;
    checked.server_version = Some(server.version.clone());
    if !judge::server(&server, &mut checked) {
        return Ok(checked);
    }
    let facts: catalog::Catalog = ask(session, &catalog::catalog(plan, timeout(plan))).await?;
    judge::catalog(plan, &server, &facts, &mut checked);
    // Where more is wrong, the server would only say one of these things again.
    if checked.blocking().is_some() {
        return Ok(checked);
    }
    match batch_steps(session, plan).await {
        Ok((start, steps)) => {
            try_values(session, plan, &facts, &mut checked).await?;
            if checked.is_clean(Subject::Index) {
                look_ahead(session, plan, &start, &mut checked).await?;
            }
            let completion = completion_indexes(session, plan, &facts).await?;
            batch::judge(&steps, completion.as_deref(), &facts, &mut checked);
        }
        Err(error) if error.class() == Class::Transient && error.reason() != Reason::DatabaseError => {
            return Err(error);
        }
        Err(error) => batch::judge_refusal(&error, &mut checked),
    }
    Ok(checked)
}

/// Has the server evaluate what planning leaves for each row: domains, and the CHECKs that the values decide.
async fn try_values(
    session: &Session,
    plan: &Plan,
    facts: &catalog::Catalog,
    checked: &mut PreflightReport,
) -> Result<(), Error> {
    let Some(table) = &facts.table else { return Ok(()) };
    for trial in values::trials(plan, table) {
        let sql = transaction::trial(&trial.sql, timeout(plan));
        match session.query(Step::Preflight, &sql, TIMEOUT).await {
            Ok(answer) => {
                let answer = last_row(&answer).and_then(|row| text(row, 0));
                values::trial(&trial, Ok(answer), checked);
            }
            Err(error) => {
                session.rollback().await;
                if error.sqlstate().is_none() || session.is_closed() {
                    return Err(error);
                }
                values::trial(&trial, Err(&error), checked);
            }
        }
    }
    values::untried(plan, facts, table, checked);
    Ok(())
}

/// A statement of the preflight takes no longer than one of the sweep.
fn timeout(plan: &Plan) -> Duration {
    plan.statement_timeout.min(TIMEOUT)
}

/// Asks a question that is answered by one JSON document, in one row or in pieces.
async fn ask<T: DeserializeOwned>(session: &Session, sql: &str) -> Result<T, Error> {
    let answer = session.query(Step::Preflight, sql, TIMEOUT).await?;
    serde_json::from_str(&lines(&answer).concat()).ok().ok_or(Error::Answer("the question about the catalog"))
}

/// What a sweep asks first.
async fn ask_start(session: &Session, plan: &Plan) -> Result<Start, Error> {
    let answer = ask_plan(session, &start::start(plan, timeout(plan))).await?;
    start::read_start(&answer).ok_or(Error::Answer("the first question of a sweep"))
}

/// The server's plan for the batch that a sweep would run now, a line each.
async fn batch_steps(session: &Session, plan: &Plan) -> Result<(Start, Vec<String>), Error> {
    let start = ask_start(session, plan).await?;
    let answer = ask_plan(session, &statement::explain(plan, &start, Locking::Pessimistic, timeout(plan))).await?;
    Ok((start, lines(&answer)))
}

/// Compares the newest open start with the clock.
async fn look_ahead(session: &Session, plan: &Plan, start: &Start, checked: &mut PreflightReport) -> Result<(), Error> {
    let answer = match ask_plan(session, &statement::newest(plan, start, timeout(plan))).await {
        Err(error) if error.sqlstate().is_none() || session.is_closed() => return Err(error),
        answer => answer.unwrap_or_default(),
    };
    let newest = last_row(&answer).and_then(|row| text(row, 0)).and_then(start::read_time);
    if let (Some(newest), Some(now)) = (newest, start.now) {
        types::starts_ahead(plan, start.started, newest - now, checked);
    }
    Ok(())
}

/// The indexes that the server would use to complete a row by its key, as the application does it. None: it was not asked.
async fn completion_indexes(
    session: &Session,
    plan: &Plan,
    facts: &catalog::Catalog,
) -> Result<Option<Vec<String>>, Error> {
    let column = facts.table.as_ref().and_then(|table| table.column(&plan.names.id));
    let Some(column) = column else { return Ok(None) };
    let sql = statement::explain_completion(plan, &column.type_text, timeout(plan));
    match ask_plan(session, &sql).await {
        Ok(answer) => {
            let document: Option<Value> = serde_json::from_str(&lines(&answer).join("\n")).ok();
            let mut indexes = vec![];
            index_names(&document.ok_or(Error::Answer("the plan of a completion"))?, &mut indexes);
            Ok(Some(indexes))
        }
        Err(error) if error.sqlstate().is_none() || session.is_closed() => Err(error),
        // It only costs a warning.
        Err(_) => Ok(None),
    }
}

/// Every index that a plan in JSON names.
fn index_names(plan: &Value, names: &mut Vec<String>) {
    match plan {
        Value::Object(fields) => {
            names.extend(fields.get("Index Name").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|field| index_names(field, names));
        }
        Value::Array(items) => items.iter().for_each(|item| index_names(item, names)),
        _ => {}
    }
}

/// Sends statements of the preflight, and rolls back what an error in them left open.
async fn ask_plan(session: &Session, sql: &str) -> Result<Vec<SimpleQueryMessage>, Error> {
    let answer = session.query(Step::Preflight, sql, TIMEOUT).await;
    if answer.is_err() {
        session.rollback().await;
    }
    answer
}

/// The first field of every row.
fn lines(answer: &[SimpleQueryMessage]) -> Vec<String> {
    let rows = answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => text(row, 0).map(str::to_owned),
        _ => None,
    });
    rows.collect()
}
