//! Judges indexes, pure: whether one serves, on the table and each partition, and how to come by one where none does.

use super::catalog::{Catalog, Index, Node};
use super::finding::{Part, RunAs};
use super::fix::{self, Does, Wanted, qualified};
use crate::sweep::open_index::OpenPredicate;

impl Wanted<'_> {
    /// Whether an index does what is wanted; it may do more.
    pub fn is_served_by(&self, index: &Index) -> bool {
        if self.unique {
            // Unique by fewer columns is unique by all.
            let within = |column: &Option<String>| column.as_deref().is_some_and(|name| self.columns.contains(&name));
            return index.unique && !index.partial && index.columns.iter().all(within);
        }
        let leads = self.columns.iter().zip(&index.columns).all(|(want, have)| have.as_deref() == Some(*want));
        index.ordered && index.columns.len() >= self.columns.len() && leads && index.open == self.predicate_kind()
    }

    /// The same with another predicate.
    pub fn with(self, predicate: OpenPredicate) -> Self {
        Self { open: self.open.map(|(_, column)| (predicate, column)), ..self }
    }

    fn predicate_kind(&self) -> Option<OpenPredicate> {
        self.open.map(|(predicate, _)| predicate)
    }

    /// Whether an index is the very one that we would create, so that it can be part of the parent's.
    fn is(&self, index: &Index) -> bool {
        let same = self.columns.iter().map(|name| Some(*name)).eq(index.columns.iter().map(Option::as_deref));
        let predicate = if self.unique { !index.partial } else { index.open == self.predicate_kind() };
        index.ordered && same && predicate && !index.includes && index.unique == self.unique
    }

    /// Whether one is there for the whole table.
    pub fn is_there(&self, facts: &Catalog) -> bool {
        // That of a partitioned table is valid once every partition has its part.
        facts.tree.first().is_some_and(|table| self.serving(table).is_some())
    }

    /// Whether every partition has one, though the table itself may have none for partitions to come.
    pub fn is_on_every_partition(&self, facts: &Catalog) -> bool {
        let mut leaves = facts.tree.iter().filter(|node| node.kind != "p").peekable();
        leaves.peek().is_some() && leaves.all(|leaf| self.serving(leaf).is_some())
    }

    fn serving<'a>(&self, node: &'a Node) -> Option<&'a Index> {
        node.indexes.iter().find(|index| index.valid && self.is_served_by(index))
    }

    /// Every valid index that serves, with its node. Those that are part of a parent's come after it.
    pub fn all_serving<'a>(&'a self, facts: &'a Catalog) -> impl Iterator<Item = (&'a Node, &'a Index)> {
        let of_node = |node: &'a Node| node.indexes.iter().map(move |index| (node, index));
        nodes(facts).flat_map(of_node).filter(|(_, index)| index.valid && self.is_served_by(index))
    }

    /// The statements that drop every index that serves, also broken ones. A part goes with its parent's, which cannot be
    /// dropped CONCURRENTLY.
    pub fn drops(&self, facts: &Catalog) -> Vec<Part> {
        let own = nodes(facts).flat_map(|node| node.indexes.iter().map(move |index| (node, index)));
        let own = own.filter(|(_, index)| index.parent.is_none() && !index.constraint && self.is_served_by(index));
        let drop = |(node, index): (&Node, &Index)| {
            let concurrently = if node.kind == "p" { "" } else { "CONCURRENTLY " };
            by_owner(node, format!("DROP INDEX {concurrently}{}", qualified(&node.schema, &index.name)))
        };
        fix::in_turn(own.map(drop))
    }

    /// How to come from the `plain` index to this one without a gap, and why.
    pub fn replacement(&self, plain: &Self, node: &Node, index: &Index, facts: &Catalog) -> (String, Vec<Part>) {
        let why = format!(
            "the index {} slows the application: PostgreSQL also uses it for the application's own completions (WHERE id = \
             ... AND time_completed IS NULL), and each of them leaves a dead entry there. Measured: 4,700 completions per \
             second without it, 1,658 with it after half a minute",
            qualified(&node.schema, &index.name)
        );
        if let Some((node, index)) = self.all_serving(facts).find(|(_, index)| index.pending) {
            let name = qualified(&node.schema, &index.name);
            let wait = format!(
                "{name}, which replaces it, does not serve yet: it was made while older transactions were running. Check \
                 again once they have ended, and drop the other one then"
            );
            return (format!("{why}. {wait}"), vec![]);
        }
        let mut parts = if self.is_there(facts) { vec![] } else { self.parts(facts) };
        parts.extend(plain.drops(facts));
        let text = format!("{why}. Replace it by an index that only the sweep uses; sweeps go on meanwhile");
        (text, fix::in_turn(parts))
    }

    /// What keeps an index that is there from serving.
    pub fn obstacle(&self, facts: &Catalog) -> Option<String> {
        let all = || nodes(facts).flat_map(|node| node.indexes.iter().map(move |index| (node, index)));
        let name = |(node, index): (&Node, &Index)| qualified(&node.schema, &index.name);
        if let Some(found) = all().find(|(node, index)| node.kind != "p" && !index.valid && self.is_served_by(index)) {
            return Some(format!("{} is not valid: its creation failed, or is under way", name(found)));
        }
        if self.unique {
            return None;
        }
        let leads = |index: &Index| index.columns.first().and_then(Option::as_deref) == self.columns.first().copied();
        let serves = |index: &Index| {
            [OpenPredicate::Private, OpenPredicate::Plain].iter().any(|open| self.with(*open).is_served_by(index))
        };
        let (node, index) = all().find(|(_, index)| leads(index) && !serves(index))?;
        let why = if index.columns.get(1).and_then(Option::as_deref) != self.columns.get(1).copied() {
            "its columns do not begin with these two"
        } else if index.open.is_some() {
            "its columns are sorted another way"
        } else if index.partial {
            "its WHERE is another"
        } else {
            "it also holds every complete row, through which each sweep would have to walk"
        };
        Some(format!("{} does not serve: {why}", name((node, index))))
    }

    /// The statements that bring it about, on the table and each partition, while the application goes on writing.
    /// First come the rights in schemas that this takes.
    pub fn parts(&self, facts: &Catalog) -> Vec<Part> {
        let all = || nodes(facts).flat_map(|node| node.indexes.iter().map(move |index| (node, index)));
        // One that is broken and part of the parent's cannot be dropped alone: the whole goes and comes anew.
        let broken = all().filter(|(node, index)| node.kind != "p" && !index.valid && self.is(index));
        let mut gone = vec![];
        let mut statements = drop_wholes(facts, broken.filter_map(|(_, index)| index.parent), &mut gone);
        // One that has all its parts and never became valid, since the last to lack one went: nothing wakes it. Its parts
        // serve until there are others.
        let stuck = all().filter(|(node, index)| self.is_own(node, index) && is_stuck(facts, node, index));
        let last = drop_wholes(facts, stuck.map(|(_, index)| index.oid), &mut gone);
        let mut needs = vec![];
        let attach = self.create_missing(facts, &gone, &mut statements, &mut needs);
        // From below, so that each is whole when it becomes a part.
        for (node, name, index) in attach.iter().rev() {
            let Some((above, whole, whole_index)) =
                node.parent.and_then(|parent| attach.iter().find(|(above, ..)| above.oid == parent))
            else {
                continue;
            };
            let attached = index.and_then(|index| index.parent);
            if attached.is_none() || attached != whole_index.map(|whole| whole.oid) {
                let (whole, name) = (qualified(&above.schema, whole), qualified(&node.schema, name));
                statements.push(by_owner(above, format!("ALTER INDEX {whole} ATTACH PARTITION {name}")));
                needs.push((above.owner.as_str(), node.schema.as_str(), Does::Names));
            }
        }
        statements.extend(last);
        let mut parts = fix::grants(&facts.schemas, needs);
        parts.extend(fix::in_turn(statements));
        parts
    }

    /// Creates what the table and each partition lack, apart from indexes that are `gone`. What each has then, from the top:
    /// the index by its name, and as it is if it is there already.
    fn create_missing<'a>(
        &self,
        facts: &'a Catalog,
        gone: &[i64],
        statements: &mut Vec<Part>,
        needs: &mut Vec<(&'a str, &'a str, Does)>,
    ) -> Vec<(&'a Node, String, Option<&'a Index>)> {
        let mut taken = facts.taken.clone();
        let is_gone = |index: &Index| gone.contains(&topmost(facts, index.oid));
        let mut attach: Vec<(&Node, String, Option<&Index>)> = vec![];
        // A partition on another server has no index.
        for node in nodes(facts).filter(|node| node.kind != "f") {
            let own = |index: &&Index| self.is_own(node, index) && !is_gone(index);
            needs.push((node.owner.as_str(), node.schema.as_str(), Does::Names));
            let parent = node.parent.and_then(|parent| attach.iter().find(|(above, ..)| above.oid == parent));
            let parent = parent.and_then(|(_, _, index)| index.map(|index| index.oid));
            let partitioned = node.kind == "p";
            // Part of the parent's already, or else of nobody's.
            let mut mine = node.indexes.iter().filter(own).filter(|index| index.valid || partitioned);
            let found = mine.clone().find(|index| index.parent.is_some() && index.parent == parent);
            if let Some(index) = found.or_else(|| mine.find(|index| index.parent.is_none())) {
                attach.push((node, index.name.clone(), Some(index)));
                continue;
            }
            for broken in node.indexes.iter().filter(own).filter(|index| !index.valid && index.parent.is_none()) {
                let drop = format!("DROP INDEX CONCURRENTLY {}", qualified(&node.schema, &broken.name));
                statements.push(by_owner(node, drop));
                taken.retain(|(schema, name)| *schema != node.schema || *name != broken.name);
            }
            let name = self.name(&node.schema, &node.name, &mut taken);
            let create = if partitioned { Self::create_parent } else { Self::create };
            statements.push(by_owner(node, create(self, &name, &node.schema, &node.name)));
            needs.push((node.owner.as_str(), node.schema.as_str(), Does::Creates));
            attach.push((node, name, None));
        }
        attach
    }

    /// Whether an index is one to build on. That of a constraint takes no parts but those of constraints.
    fn is_own(&self, node: &Node, index: &Index) -> bool {
        self.is(index) && (index.valid || !index.constraint || node.kind != "p")
    }
}

/// The table and its partitions, if it has any; a child by INHERITS shares no index.
fn nodes(facts: &Catalog) -> impl Iterator<Item = &Node> {
    let partitioned = facts.tree.first().is_some_and(|table| table.kind == "p");
    facts.tree.iter().take(if partitioned { usize::MAX } else { 1 })
}

fn by_owner(node: &Node, statement: String) -> Part {
    fix::part(RunAs::Owner(node.owner.clone()), [statement])
}

/// Drops the whole indexes that these are parts of, and remembers those as `gone`.
fn drop_wholes(facts: &Catalog, parts: impl Iterator<Item = i64>, gone: &mut Vec<i64>) -> Vec<Part> {
    let mut statements = vec![];
    for whole in parts.map(|part| topmost(facts, part)) {
        let mut all = nodes(facts).flat_map(|node| node.indexes.iter().map(move |index| (node, index)));
        if !gone.contains(&whole)
            && let Some((node, index)) = all.find(|(_, index)| index.oid == whole)
        {
            statements.push(by_owner(node, format!("DROP INDEX {}", qualified(&node.schema, &index.name))));
            gone.push(whole);
        }
    }
    statements
}

/// Whether an index of a partitioned table is not valid although each partition has its valid part.
fn is_stuck(facts: &Catalog, node: &Node, index: &Index) -> bool {
    let is_part = |part: &Index| part.parent == Some(index.oid) && part.valid;
    node.kind == "p"
        && !index.valid
        && facts
            .tree
            .iter()
            .filter(|below| below.parent == Some(node.oid) && below.kind != "f")
            .all(|below| below.indexes.iter().any(is_part))
}

/// The index of the table at the top of which this one is a part.
fn topmost(facts: &Catalog, oid: i64) -> i64 {
    let mut top = oid;
    let parent = |oid| facts.tree.iter().flat_map(|node| &node.indexes).find(|index| index.oid == oid)?.parent;
    // A tree is no deeper than it has nodes.
    for _ in &facts.tree {
        match parent(top) {
            Some(above) => top = above,
            None => break,
        }
    }
    top
}
