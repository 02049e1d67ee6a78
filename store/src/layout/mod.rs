//! Everything about sizes and places, worked out from a [`StoreSpec`] without touching memory.
//!
//! Two address spaces:
//!
//! ```text
//! parameter index space (units: parameters)
//!   | block 0: tensor  tensor .. pad | block 1: tensor .. pad | ...            |   span, a multiple of 64
//!   | page 0      | page 1      | page 2      | ...                 | last page |   page_parameters each, the last one shorter
//!
//! segment (units: bytes, every section starts at a multiple of 4096)
//!   | header | live words | manifest | page table | control | exchange | gradients | physical pages |
//! ```
//!
//! A physical page holds one page of the index space: `hi` (bf16 weights), `lo` (low sixteen bits of the fp32 master),
//! first moments, second moments, each an array over the page. There are more physical pages than pages: every rank has
//! spares, into which the next state is written.

#[cfg(test)]
mod tests;

mod owners;

pub(crate) use owners::Owners;
pub use owners::{SHARE_ALIGN, share_of};

use crate::error::StoreError;
use crate::spec::{GradientFormat, GradientLog, PageId, StoreSpec};
use std::collections::HashMap;
use std::ops::Range;

/// Sections of the segment and mapped memory are aligned to this, in bytes.
pub(crate) const SECTION_ALIGN: u64 = 4096;
/// Tensors and blocks start at multiples of this, in parameters.
pub(crate) const TENSOR_ALIGN: u64 = 64;
/// Page sizes are multiples of this, in parameters: every array of a page then fills whole 2048-byte units.
pub(crate) const PAGE_GRANULE: u32 = 1024;
/// Words of the control area.
pub(crate) const CONTROL_WORDS: usize = 4096;
/// Bytes of the section that changes outside the pages: generation and step record.
pub(crate) const LIVE_BYTES: u64 = 4096;
/// Bytes of the fixed header.
pub(crate) const HEADER_BYTES: u64 = 4096;
/// Largest manifest that is written or read, in bytes.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 256 << 20;

const PARAMETERS_MAX: u64 = 1 << 46;
const WORLD_SIZE_MAX: u32 = 1024;
const SPARES_MAX: u32 = 16;
const PHYSICAL_MAX: u64 = 1 << 20;
const PAGE_PARAMETERS_MAX: u32 = 1 << 28;
const DIMENSIONS_MAX: usize = 32;
const NAME_BYTES_MAX: usize = 1024;

/// Where a block lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name.
    pub name: String,
    /// First parameter; a multiple of 64.
    pub start: u64,
    /// Parameters up to the next block, padding included; a multiple of 64.
    pub len: u64,
    /// Its tensors, as indices into [`Layout::tensors`].
    pub tensors: Range<usize>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// Its block, as an index into [`Layout::blocks`].
    pub block: usize,
    /// First parameter; a multiple of 64 unless joined to the tensor before.
    pub start: u64,
    /// Parameters: the product of the dimensions.
    pub len: u64,
    /// Weight decay applies to it.
    pub decay: bool,
}

/// Where the parts of a segment lie, in bytes from its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sections {
    /// Manifest (JSON), without the padding behind it.
    pub manifest: Range<u64>,
    /// One 8-byte entry a page.
    pub page_table: Range<u64>,
    /// Control words.
    pub control: Range<u64>,
    /// Exchange area.
    pub exchange: Range<u64>,
    /// Gradients over the parameter index space, and behind them those of the log.
    pub gradients: Range<u64>,
    /// Physical pages.
    pub pages: Range<u64>,
}

/// Sizes and places of everything in a store.
#[derive(Debug, Clone)]
pub struct Layout {
    spec: StoreSpec,
    blocks: Vec<Block>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    parameters: u64,
    span: u64,
    page_parameters: u32,
    page_count: u32,
    owners: Owners,
    log: Vec<LogRun>,
    sections: Sections,
}

/// Parameters of pages that have a log, and where the first of them is among all that do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LogRun {
    params: Range<u64>,
    at: u64,
}

impl Layout {
    /// Lays out a store.
    ///
    /// # Errors
    /// [`StoreError::Spec`] names what is wrong: no parameters, a zero dimension, a name used twice, a size beyond what
    /// can be addressed, a page size or a number of ranks or spares out of range.
    pub fn new(spec: &StoreSpec) -> Result<Layout, StoreError> {
        let mut layout = Layout::place(spec)?;
        let manifest = crate::format::manifest_bytes(&layout)?.len() as u64;
        layout.place_sections(manifest)?;
        Ok(layout)
    }

    /// As [`Layout::new`], for a manifest of known length.
    pub(crate) fn with_manifest_length(spec: &StoreSpec, manifest: u64) -> Result<Layout, StoreError> {
        let mut layout = Layout::place(spec)?;
        layout.place_sections(manifest)?;
        Ok(layout)
    }

    fn place(spec: &StoreSpec) -> Result<Layout, StoreError> {
        if !(1..=WORLD_SIZE_MAX).contains(&spec.world_size) {
            return Err(refuse(format!("world size {} is not between 1 and {WORLD_SIZE_MAX}", spec.world_size)));
        }
        if !(1..=SPARES_MAX).contains(&spec.spare_pages_per_rank) {
            return Err(refuse(format!("{} spare pages a rank is not between 1 and {SPARES_MAX}", spec.spare_pages_per_rank)));
        }
        let mut blocks: Vec<Block> = Vec::with_capacity(spec.blocks.len());
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut by_name = HashMap::new();
        let mut block_names = std::collections::HashSet::new();
        let (mut at, mut parameters) = (0u64, 0u64);
        for (index, block) in spec.blocks.iter().enumerate() {
            check_name("block", &block.name)?;
            if !block_names.insert(block.name.as_str()) {
                return Err(refuse(format!("two blocks are named {:?}", block.name)));
            }
            let (start, first) = (at, tensors.len());
            for tensor in &block.tensors {
                check_name("tensor", &tensor.name)?;
                let len = element_count(&tensor.name, &tensor.shape)?;
                if tensor.joined && tensors.len() == first {
                    return Err(refuse(format!(
                        "tensor {:?} is the first of its block and cannot be joined to one before it",
                        tensor.name
                    )));
                }
                if !tensor.joined {
                    at = at.next_multiple_of(TENSOR_ALIGN);
                }
                if by_name.insert(tensor.name.clone(), tensors.len()).is_some() {
                    return Err(refuse(format!("two tensors are named {:?}", tensor.name)));
                }
                tensors.push(Tensor {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    block: index,
                    start: at,
                    len,
                    decay: tensor.decay,
                });
                at += len;
                parameters += len;
                if at > PARAMETERS_MAX {
                    return Err(refuse(format!(
                        "the tensors up to {:?} take more than the {PARAMETERS_MAX} parameters a store may hold",
                        tensor.name
                    )));
                }
            }
            at = at.next_multiple_of(TENSOR_ALIGN);
            blocks.push(Block { name: block.name.clone(), start, len: at - start, tensors: first..tensors.len() });
        }
        if parameters == 0 {
            return Err(refuse("no block has a tensor".into()));
        }
        let page_parameters = match spec.page_parameters {
            None => default_page_parameters(at, spec.world_size),
            Some(p) if p.is_multiple_of(PAGE_GRANULE) && (PAGE_GRANULE..=PAGE_PARAMETERS_MAX).contains(&p) => p,
            Some(p) => {
                return Err(refuse(format!(
                    "{p} parameters a page is not a multiple of {PAGE_GRANULE} between {PAGE_GRANULE} and {PAGE_PARAMETERS_MAX}"
                )));
            }
        };
        let page_count = at.div_ceil(u64::from(page_parameters));
        let physical = page_count + u64::from(spec.world_size) * u64::from(spec.spare_pages_per_rank);
        if physical > PHYSICAL_MAX {
            return Err(refuse(format!(
                "{physical} pages of {page_parameters} parameters are more than {PHYSICAL_MAX}; choose larger pages"
            )));
        }
        let log = place_log(spec, at, page_parameters, page_count)?;
        let none = Sections { manifest: 0..0, page_table: 0..0, control: 0..0, exchange: 0..0, gradients: 0..0, pages: 0..0 };
        let owners = Owners::new(&blocks, at, page_parameters, spec.world_size);
        Ok(Layout {
            spec: StoreSpec { page_parameters: Some(page_parameters), ..spec.clone() },
            blocks,
            tensors,
            by_name,
            parameters,
            span: at,
            page_parameters,
            page_count: page_count as u32,
            owners,
            log,
            sections: none,
        })
    }

    fn place_sections(&mut self, manifest: u64) -> Result<(), StoreError> {
        if manifest > MANIFEST_BYTES_MAX {
            return Err(refuse(format!("its manifest of {manifest} bytes is larger than {MANIFEST_BYTES_MAX}")));
        }
        let mut at = HEADER_BYTES + LIVE_BYTES;
        let mut section = |len: Option<u64>| -> Option<Range<u64>> {
            let range = at..at.checked_add(len?)?;
            at = range.end.checked_next_multiple_of(SECTION_ALIGN)?;
            Some(range)
        };
        let exchange = self.spec.exchange_bytes.checked_next_multiple_of(SECTION_ALIGN);
        let places = (|| {
            Some(Sections {
                manifest: section(Some(manifest))?,
                page_table: section(Some(u64::from(self.page_count) * 8))?,
                control: section(Some(CONTROL_WORDS as u64 * 8))?,
                exchange: section(exchange)?,
                gradients: section(self.gradient_span().checked_mul(self.spec.gradients.bytes()))?,
                pages: section(u64::from(self.physical_count()).checked_mul(self.page_bytes()))?,
            })
        })();
        match places {
            Some(sections) if sections.pages.end <= i64::MAX as u64 => {
                self.sections = sections;
                Ok(())
            }
            _ => Err(refuse("its segment is larger than any file can be".into())),
        }
    }

    /// Bytes of the whole segment; a multiple of 4096.
    pub fn bytes(&self) -> u64 {
        self.sections.pages.end
    }

    /// Parameters of the model, padding not counted.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Length of the parameter index space, padding included; a multiple of 64.
    pub fn span(&self) -> u64 {
        self.span
    }

    /// Blocks in order. They follow one another without a gap and together cover the index space.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Tensors in order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|i| &self.tensors[*i])
    }

    /// Pages that the index space is cut into.
    pub fn page_count(&self) -> u32 {
        self.page_count
    }

    /// Parameters a page; the last page may hold fewer.
    pub fn page_parameters(&self) -> u32 {
        self.page_parameters
    }

    /// Physical pages in the segment: pages and spares.
    pub fn physical_count(&self) -> u32 {
        self.page_count + self.spec.world_size * self.spec.spare_pages_per_rank
    }

    /// Bytes of one physical page; a multiple of 4096.
    pub fn page_bytes(&self) -> u64 {
        u64::from(self.page_parameters) * (4 + 2 * self.spec.moments.bytes())
    }

    /// Parameters of a page; empty for a page that is not there.
    pub fn page_range(&self, page: PageId) -> Range<u64> {
        let size = u64::from(self.page_parameters);
        let start = (u64::from(page) * size).min(self.span);
        start..(start + size).min(self.span)
    }

    /// Rank that owns a page: the one whose share of a block ([`share_of`]) the page lies in. Pages that lie in several go where
    /// fewest are. All ranks work on the same block at once, and what one of them makes of its share is there with it.
    pub fn page_owner(&self, page: PageId) -> u32 {
        self.owners.of(page)
    }

    /// Pages of a rank, ascending.
    pub fn pages_of_rank(&self, rank: u32) -> impl Iterator<Item = PageId> + use<> {
        self.owners.pages(rank)
    }

    pub(crate) fn owners(&self) -> &Owners {
        &self.owners
    }

    /// Pages that hold any of these parameters; what lies outside the index space is ignored.
    pub fn pages_of(&self, parameters: Range<u64>) -> Range<PageId> {
        let (start, end) = (parameters.start.min(self.span), parameters.end.min(self.span));
        let size = u64::from(self.page_parameters);
        let first = (start / size) as PageId;
        if start >= end { first..first } else { first..end.div_ceil(size) as PageId }
    }

    /// Parameters that have a log.
    pub fn logged_parameters(&self) -> u64 {
        self.log.last().map_or(0, |run| run.at + (run.params.end - run.params.start))
    }

    /// Length of the array of gradients: one for each parameter, and those of the log.
    pub fn gradient_span(&self) -> u64 {
        self.span + u64::from(self.spec.log.steps - 1) * self.logged_parameters()
    }

    /// The run of logged parameters that `parameter` lies in.
    fn logged(&self, parameter: u64) -> Option<&LogRun> {
        let next = self.log.partition_point(|run| run.params.end <= parameter);
        self.log.get(next).filter(|run| run.params.contains(&parameter))
    }

    /// Place in the array of gradients of that of `parameter` at `step`. Steps that are [`GradientLog::steps`] apart share a place.
    pub fn gradient_at(&self, parameter: u64, step: u64) -> u64 {
        match (step % u64::from(self.spec.log.steps), self.logged(parameter)) {
            (turn @ 1.., Some(run)) => self.span + (turn - 1) * self.logged_parameters() + run.at + parameter - run.params.start,
            _ => parameter,
        }
    }

    /// `params` cut where their gradients of a step go on elsewhere: parts that lie in one piece of the array.
    pub fn gradient_parts(&self, params: Range<u64>) -> Vec<Range<u64>> {
        let first = self.log.partition_point(|run| run.params.end <= params.start);
        let mut parts = Vec::new();
        let mut at = params.start;
        let cuts = self.log[first..].iter().flat_map(|run| [run.params.start, run.params.end]);
        for cut in cuts.take_while(|cut| *cut < params.end).chain([params.end]) {
            if cut > at {
                parts.push(at..cut);
                at = cut;
            }
        }
        parts
    }

    /// Steps that a page may be behind the committed one: its gradients of as many are kept.
    pub fn may_lag(&self, page: PageId) -> u64 {
        match self.logged(self.page_range(page).start) {
            Some(_) => u64::from(self.spec.log.steps) - 1,
            None => 0,
        }
    }

    /// What the store was laid out from, its page size filled in.
    pub fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    /// Places in the segment.
    pub fn sections(&self) -> &Sections {
        &self.sections
    }
}

/// Where the gradients of the logged pages lie in the log.
fn place_log(spec: &StoreSpec, span: u64, page_parameters: u32, page_count: u64) -> Result<Vec<LogRun>, StoreError> {
    let (log, page) = (&spec.log, u64::from(page_parameters));
    if log.is_none() {
        return Ok(Vec::new());
    }
    if !(2..=GradientLog::STEPS_MAX).contains(&log.steps) || log.pages.is_empty() {
        return Err(refuse(format!(
            "a log of {} steps and {} runs of pages: 2 to {} steps, and pages, are allowed",
            log.steps,
            log.pages.len(),
            GradientLog::STEPS_MAX
        )));
    }
    if spec.gradients == GradientFormat::None {
        return Err(refuse("a log of gradients that are not in the segment".into()));
    }
    let (mut runs, mut at, mut free) = (Vec::with_capacity(log.pages.len()), 0, None);
    for pages in &log.pages {
        if pages.is_empty() || u64::from(pages.end) > page_count || free.is_some_and(|free| pages.start <= free) {
            return Err(refuse(format!(
                "pages {pages:?} of the log do not follow those before them, or are not among the {page_count} there are"
            )));
        }
        free = Some(pages.end);
        let params = u64::from(pages.start) * page..(u64::from(pages.end) * page).min(span);
        let len = params.end - params.start;
        runs.push(LogRun { params, at });
        at += len;
    }
    Ok(runs)
}

fn refuse(reason: String) -> StoreError {
    StoreError::Spec(reason)
}

fn check_name(what: &str, name: &str) -> Result<(), StoreError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse(format!("a {what} name of {} bytes; 1 to {NAME_BYTES_MAX} are allowed", name.len())));
    }
    Ok(())
}

fn element_count(name: &str, shape: &[u64]) -> Result<u64, StoreError> {
    if shape.len() > DIMENSIONS_MAX {
        return Err(refuse(format!("tensor {name:?} has {} dimensions; {DIMENSIONS_MAX} are allowed", shape.len())));
    }
    if shape.contains(&0) {
        return Err(refuse(format!("tensor {name:?} of shape {shape:?} has a dimension of zero")));
    }
    let count = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d).filter(|n| *n <= PARAMETERS_MAX));
    count
        .ok_or_else(|| refuse(format!("tensor {name:?} of shape {shape:?} has more than the {PARAMETERS_MAX} parameters a store may hold")))
}

fn default_page_parameters(span: u64, world_size: u32) -> u32 {
    const SMALLEST: u64 = 4 << 10;
    const LARGEST: u64 = 16 << 20;
    const PAGES_PER_RANK: u64 = 16;
    let share = span / (PAGES_PER_RANK * u64::from(world_size)) / u64::from(PAGE_GRANULE) * u64::from(PAGE_GRANULE);
    share.clamp(SMALLEST, LARGEST) as u32
}
