//! The layout of `src`: modules import only downwards and never in a circle, and files and functions stay short.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules, from the top down. Each imports only from itself and from those below it.
const LAYERS: [&str; 9] =
    ["cli", "controller", "preflight", "sweep", "database", "telemetry", "credentials", "schedule", "api"];

/// The most lines of a file without its tests.
const LONGEST_FILE: usize = 399;

/// The most lines of a function.
const LONGEST_FUNCTION: usize = 60;

/// A path from the crate's root, such as `["sweep", "plan", "Plan"]`.
type ModulePath = Vec<String>;

/// One file of `src`, without its tests.
struct Source {
    module: ModulePath,
    text: String,
}

impl Source {
    fn read(root: &Path, path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
        let relative = path.strip_prefix(root).unwrap().with_extension("");
        let mut module: ModulePath = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        module.pop_if(|last| last == "mod" || last == "lib");
        Self { module, text }
    }

    /// Every path that begins with `crate` or `super`, from the crate's root.
    fn imports(&self) -> BTreeSet<ModulePath> {
        let code = self.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = code.collect::<Vec<_>>().join("\n");
        let mut paths = vec![];
        for statement in code.split(';') {
            let start = statement.rfind("use ").filter(|start| {
                let before = statement[..*start].rsplit('\n').next().unwrap().trim();
                before.is_empty() || before.starts_with("pub")
            });
            match start {
                Some(start) => expand(&statement[start + 4..], &mut paths),
                None => paths
                    .extend(statement.split(|c: char| !(c.is_alphanumeric() || "_:".contains(c))).map(str::to_owned)),
            }
        }
        paths.iter().filter_map(|path| self.absolute(path)).collect()
    }

    fn absolute(&self, path: &str) -> Option<ModulePath> {
        let parts: ModulePath = path.split("::").map(str::to_owned).collect();
        let supers = parts.iter().take_while(|part| *part == "super").count();
        match parts.first()?.as_str() {
            "crate" => Some(parts[1..].to_vec()),
            "super" => Some([&self.module[..self.module.len() - supers], &parts[supers..]].concat()),
            _ => None,
        }
    }

    /// The functions and how many lines each has, as rustfmt lays them out.
    fn functions(&self) -> Vec<(String, usize)> {
        let lines: Vec<&str> = self.text.lines().collect();
        let mut functions = vec![];
        for (number, line) in lines.iter().enumerate() {
            let Some((before, rest)) = line.split_once("fn ") else { continue };
            let words = ["pub", "pub(super)", "const", "async"];
            if !before.split_whitespace().all(|word| words.contains(&word)) {
                continue;
            }
            let end = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
            if let Some(length) = lines[number..].iter().position(|line| *line == end) {
                functions.push((rest.split(['(', '<']).next().unwrap().to_owned(), length + 1));
            }
        }
        functions
    }
}

/// The paths of a `use`: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn expand(tree: &str, paths: &mut Vec<String>) {
    let tree: String = tree.split_whitespace().collect::<Vec<_>>().join(" ");
    let Some((prefix, rest)) = tree.split_once('{') else {
        paths.push(tree.split(" as ").next().unwrap().trim().trim_end_matches("::*").to_owned());
        return;
    };
    let (mut depth, mut item) = (0, String::new());
    for c in rest.trim_end().trim_end_matches('}').chars().chain([',']) {
        match c {
            ',' if depth == 0 => {
                let name = item.trim();
                if name == "self" {
                    paths.push(prefix.trim_end_matches("::").to_owned());
                } else if !name.is_empty() {
                    expand(&format!("{prefix}{name}"), paths);
                }
                item.clear();
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        item.push(c);
    }
}

fn sources() -> BTreeMap<ModulePath, Source> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, files);
            } else {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    collect(&root, &mut files);
    let is_code = |path: &PathBuf| {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap();
        path.extension().is_some_and(|extension| extension == "rs") && !["tests", "properties", "main"].contains(&stem)
    };
    files
        .iter()
        .filter(|path| is_code(path))
        .map(|path| Source::read(&root, path))
        .map(|s| (s.module.clone(), s))
        .collect()
}

#[test]
fn modules_import_only_from_themselves_and_those_below() {
    let layer = |module: &[String]| LAYERS.iter().position(|layer| module.first().is_some_and(|first| first == layer));
    let mut seen = 0;
    for (module, source) in sources() {
        let Some(own) = layer(&module) else {
            assert!(module.is_empty(), "{module:?} is in no layer");
            continue;
        };
        for path in source.imports() {
            let other = layer(&path).unwrap_or_else(|| panic!("{module:?} imports {path:?}"));
            assert!(own <= other, "{} must not import {}", module.join("::"), path.join("::"));
            seen += 1;
        }
    }
    assert!(seen > 300, "only {seen} imports were found");
}

/// A module and its own submodules are one: only others can be in a circle with it.
#[test]
fn no_import_leads_in_a_circle() {
    let sources = sources();
    // The file that a path leads into is that of its longest part that is one.
    let file_of = |path: &ModulePath| {
        (0..=path.len()).rev().map(|length| path[..length].to_vec()).find(|part| sources.contains_key(part)).unwrap()
    };
    let mut left: BTreeMap<ModulePath, BTreeSet<ModulePath>> = sources
        .iter()
        .map(|(module, source)| {
            let imports = source.imports().iter().map(file_of).collect::<BTreeSet<_>>();
            (module.clone(), imports.into_iter().filter(|other| !module.starts_with(other)).collect())
        })
        .collect();
    // What imports nothing that is left cannot be in a circle.
    loop {
        let is_left = |module: &ModulePath| left.contains_key(module);
        let done = left.iter().filter(|(_, imports)| !imports.iter().any(is_left)).map(|(module, _)| module.clone());
        let done: Vec<ModulePath> = done.collect();
        if done.is_empty() {
            break;
        }
        left.retain(|module, _| !done.contains(module));
    }
    let names = |modules: &BTreeSet<ModulePath>| {
        let names = modules.iter().filter(|module| left.contains_key(*module));
        names.map(|module| module.join("::")).collect::<Vec<_>>().join(", ")
    };
    let circles: Vec<_> = left.iter().map(|(module, to)| format!("{} -> {}", module.join("::"), names(to))).collect();
    assert!(circles.is_empty(), "in a circle, or above one:\n{}", circles.join("\n"));
}

#[test]
fn files_and_functions_are_short() {
    let (mut long, mut seen) = (vec![], 0);
    for (module, source) in sources() {
        let (module, lines, functions) = (module.join("::"), source.text.lines().count(), source.functions());
        seen += functions.len();
        if lines > LONGEST_FILE {
            long.push(format!("{module}: {lines} lines"));
        }
        let functions = functions.into_iter().filter(|(_, lines)| *lines > LONGEST_FUNCTION);
        long.extend(functions.map(|(name, lines)| format!("{module}::{name}: {lines} lines")));
    }
    assert!(long.is_empty(), "too long:\n{}", long.join("\n"));
    assert!(seen > 500, "only {seen} functions were found");
}
