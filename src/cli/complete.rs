//! Completes command lines: scripts for shells, and the words that kubectl asks a plugin for. kubectl runs
//! `kubectl_complete-sweeper` with the words so far; a link of that name to this binary answers.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Command};
use clap_complete::Shell;
use kube::ResourceExt;
use tokio::time::timeout;

use super::cluster::{Cluster, ClusterArgs};
use super::print;

/// Nobody waits longer for a completion.
const API_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script that completes `command` in a shell.
pub fn completions(args: &Completions, mut command: Command) -> ExitCode {
    let name = command.get_name().to_owned();
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    print(&mended(&String::from_utf8_lossy(&script)))
}

/// The script for bash calls a command with hyphens by one name where it sets it and by another where it looks for it
/// (clap_complete 4.6.11): after a subcommand nothing would be offered.
fn mended(script: &str) -> String {
    script.replace("audit__subcmd__log__subcmd__sweeper", "audit__log__sweeper")
}

/// What may stand where the cursor is.
#[derive(Debug, Eq, PartialEq)]
enum Wanted {
    /// These, each with what it is about.
    Words(Vec<(String, String)>),
    /// Names of AuditLogSweepers of this cluster and namespace.
    Names { namespace: Option<String>, context: Option<String>, kubeconfig: Option<OsString> },
    /// A file.
    File,
}

/// Answers kubectl: a line for each candidate, then what the shell should do besides: 4, no files; 0, files too.
pub async fn answer(command: &Command, words: &[OsString]) -> ExitCode {
    let (candidates, directive) = match wanted(command, words) {
        Wanted::Words(words) => (words, 4),
        Wanted::File => (vec![], 0),
        Wanted::Names { namespace, context, kubeconfig } => {
            let args = ClusterArgs { namespace, context, kubeconfig: kubeconfig.map(Into::into) };
            let names = async { Cluster::connect(&args).await?.list(false).await };
            // Whatever is wrong, a completion is no place to tell of it.
            let objects = timeout(API_TIMEOUT, names).await.ok().and_then(Result::ok).unwrap_or_default();
            (objects.iter().map(|object| (object.name_any(), String::new())).collect(), 4)
        }
    };
    let typed = words.last().map(|word| word.to_string_lossy()).unwrap_or_default();
    let lines =
        candidates.iter().filter(|(word, _)| word.starts_with(&*typed)).map(|(word, about)| match about.as_str() {
            "" => format!("{word}\n"),
            about => format!("{word}\t{about}\n"),
        });
    print(&format!("{}:{directive}", lines.collect::<String>()))
}

/// The last word is the one to complete.
fn wanted(root: &Command, words: &[OsString]) -> Wanted {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let Some((typed, before)) = words.split_last() else { return Wanted::Words(vec![]) };
    let visible = |command: &&Command| !command.is_hide_set();
    let about = |text: Option<&clap::builder::StyledStr>| text.map(ToString::to_string).unwrap_or_default();
    let Some((command, rest)) =
        before.split_first().and_then(|(name, rest)| Some((root.find_subcommand(&**name)?, rest)))
    else {
        let commands = root.get_subcommands().filter(visible);
        let commands = commands.map(|command| (command.get_name().to_owned(), about(command.get_about())));
        return Wanted::Words(if before.is_empty() { commands.collect() } else { vec![] });
    };
    let option = |word: &str| {
        command.get_arguments().find(|arg| {
            let long = word.strip_prefix("--").is_some_and(|long| arg.get_long() == Some(long));
            let short = word.strip_prefix('-').and_then(|rest| rest.chars().next().filter(|_| rest.len() == 1));
            (long || short.is_some_and(|short| arg.get_short() == Some(short))) && arg.get_action().takes_values()
        })
    };
    if let Some(arg) = rest.last().and_then(|word| option(word)) {
        let values = arg.get_possible_values();
        return match arg.get_id().as_str() {
            "file" | "kubeconfig" => Wanted::File,
            _ => Wanted::Words(values.iter().map(|value| (value.get_name().to_owned(), String::new())).collect()),
        };
    }
    if typed.starts_with('-') {
        let options = command.get_arguments().filter(|arg| !arg.is_hide_set());
        let options = options.filter_map(|arg| Some((format!("--{}", arg.get_long()?), about(arg.get_help()))));
        return Wanted::Words(options.collect());
    }
    let value = |long: &str| {
        let mut pairs = rest.iter().zip(rest.iter().skip(1));
        let apart = pairs.find(|(word, _)| option(word).is_some_and(|arg| arg.get_long() == Some(long)));
        let joined = || rest.iter().find_map(|word| word.strip_prefix("--")?.strip_prefix(long)?.strip_prefix('='));
        apart.map(|(_, value)| value.to_string()).or_else(|| joined().map(str::to_owned))
    };
    let mut names = rest.iter().enumerate().filter(|(at, word)| {
        let follows_option = at.checked_sub(1).and_then(|at| rest.get(at)).is_some_and(|word| option(word).is_some());
        !word.starts_with('-') && !follows_option
    });
    let positional = command.get_positionals().next();
    match positional.map(|arg| arg.get_id().as_str()) {
        Some("name") if names.next().is_none() => Wanted::Names {
            namespace: value("namespace"),
            context: value("context"),
            kubeconfig: value("kubeconfig").map(Into::into),
        },
        Some("shell") => {
            let shells = positional.map(clap::Arg::get_possible_values).unwrap_or_default();
            Wanted::Words(shells.iter().map(|shell| (shell.get_name().to_owned(), String::new())).collect())
        }
        _ => Wanted::Words(vec![]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn of(words: &[&str]) -> Wanted {
        let words: Vec<OsString> = words.iter().map(Into::into).collect();
        let mut command = crate::cli::Cli::command();
        command.build();
        wanted(&command, &words)
    }

    fn words(wanted: Wanted) -> Vec<String> {
        let Wanted::Words(words) = wanted else { panic!("{wanted:?}") };
        words.into_iter().map(|(word, _)| word).collect()
    }

    fn names(namespace: Option<&str>, context: Option<&str>) -> Wanted {
        Wanted::Names { namespace: namespace.map(Into::into), context: context.map(Into::into), kubeconfig: None }
    }

    #[test]
    fn each_place_on_the_line_has_its_words() {
        let commands = words(of(&["st"]));
        assert!(commands.contains(&"status".into()) && commands.contains(&"sweep-now".into()), "{commands:?}");
        let options = words(of(&["status", "--"]));
        assert!(options.contains(&"--all-namespaces".into()) && options.contains(&"--output".into()), "{options:?}");
        assert_eq!(words(of(&["status", "-o", ""])), ["text", "json", "yaml"]);
        assert_eq!(of(&["status", "--kubeconfig", ""]), Wanted::File);
        assert_eq!(of(&["status", ""]), names(None, None));
        assert_eq!(of(&["suspend", "-n", "shop", "a"]), names(Some("shop"), None));
        assert_eq!(
            of(&["sweep-now", "--namespace=shop", "--wait", "--context", "c", ""]),
            names(Some("shop"), Some("c"))
        );
        // One name is enough.
        assert_eq!(words(of(&["resume", "app", ""])), Vec::<String>::new());
        assert!(words(of(&["completions", ""])).contains(&"fish".into()));
        assert_eq!(words(of(&["nonsense", ""])), Vec::<String>::new());
        assert_eq!(words(of(&[])), Vec::<String>::new());
    }
}
