//! The fenced blocks of a document: what is to be run, and what says of itself why it is not. Pure.

use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag};

/// A block, and where it is.
#[derive(Debug, PartialEq)]
pub struct Block {
    /// FILE:LINE, to be found by an editor.
    pub place: String,
    pub language: String,
    pub text: String,
    /// Of the comment `<!-- not run: REASON -->` right before it, or the one that says what made the screen: those are
    /// checked as generated files.
    pub not_run: Option<String>,
}

/// Every block of code, in order.
pub fn blocks(file: &str, text: &str) -> Vec<Block> {
    let (mut found, mut not_run, mut inside) = (vec![], None, false);
    for (event, range) in Parser::new(text).into_offset_iter() {
        match event {
            Event::Start(Tag::CodeBlock(kind)) => {
                let language = match kind {
                    CodeBlockKind::Fenced(language) => language.to_string(),
                    CodeBlockKind::Indented => String::new(),
                };
                let line = text[..range.start].lines().count() + usize::from(text[..range.start].ends_with('\n'));
                let place = format!("{file}:{}", line.max(1));
                found.push(Block { place, language, text: String::new(), not_run: not_run.take() });
                inside = true;
            }
            Event::End(pulldown_cmark::TagEnd::CodeBlock) => inside = false,
            Event::Text(piece) if inside => found.last_mut().unwrap().text.push_str(&piece),
            Event::Html(html) => {
                let comment = html.trim().strip_prefix("<!--").and_then(|rest| rest.strip_suffix("-->"));
                let comment = comment.unwrap_or_default().trim();
                let reason =
                    comment.strip_prefix("not run:").or(comment.starts_with("screen, made by ").then_some(comment));
                not_run = reason.map(|reason| reason.trim().to_owned());
            }
            Event::Start(Tag::HtmlBlock) | Event::End(pulldown_cmark::TagEnd::HtmlBlock) => {}
            // It speaks of the block that is next, and of no other.
            _ => not_run = None,
        }
    }
    found
}

/// Of a block of a terminal: each command, and what is shown of its output.
pub fn commands(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = vec![];
    for line in text.lines() {
        match (line.strip_prefix("$ "), found.last_mut()) {
            (Some(command), _) => found.push((command.to_owned(), vec![])),
            (None, Some((command, _))) if command.ends_with('\\') => *command += &format!("\n{line}"),
            (None, Some((_, output))) => output.push(line.to_owned()),
            (None, None) => panic!("no command before {line:?}"),
        }
    }
    found
}

#[test]
fn blocks_are_found_with_their_place_and_what_is_said_of_them() {
    let screen = blocks(
        "x.md",
        "<!-- screen, made by `x`: status -->\n\n```console\n$ a\n```\n\n<!-- end of screen -->\n```sh\nb\n```",
    );
    assert_eq!(screen[0].not_run.as_deref(), Some("screen, made by `x`: status"));
    assert_eq!(screen[1].not_run, None);
    let text = "# A\n\n```sh\nls\n```\n\n<!-- not run: needs a daemon -->\n```console\n$ a \\\n    b\nout\n$ c\n```\n\n\
                1. item\n\n   <!-- not run: lost -->\n\n   but for this\n\n   ```sql\n   SELECT 1;\n   ```\n\n    indented\n";
    let found = blocks("x.md", text);
    let block = |line: usize, language: &str, text: &str, not_run: Option<&str>| Block {
        place: format!("x.md:{line}"),
        language: language.into(),
        text: text.into(),
        not_run: not_run.map(str::to_owned),
    };
    let console = "$ a \\\n    b\nout\n$ c\n";
    assert_eq!(found[..2], [block(3, "sh", "ls\n", None), block(8, "console", console, Some("needs a daemon"))]);
    assert_eq!((found[2].text.as_str(), found[2].language.as_str(), &found[2].not_run), ("SELECT 1;\n", "sql", &None));
    assert_eq!(commands(console), [("a \\\n    b".to_owned(), vec!["out".to_owned()]), ("c".to_owned(), vec![])]);
}
