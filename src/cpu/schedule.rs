//! Work in phases, shared among threads by tickets.
//!
//! A run is a list of phases; a phase is a number of tasks that may run in any order, and every task of a phase reads
//! what the phases before it wrote. Threads draw tickets in phase order from one counter. A thread whose ticket is of
//! a later phase waits for the tickets before that phase: these are all held by threads that are running, so the
//! run goes on however few of the threads it asked for ever start (a busy rayon pool, a call from inside a rayon task).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The tickets of one run.
pub(crate) struct Schedule {
    /// The first ticket of each phase, and the end.
    starts: Vec<usize>,
    next: AtomicUsize,
    done: AtomicUsize,
    failed: AtomicBool,
}

/// A task to do. It counts as done when it is dropped, also by a panic, so that no other thread waits for it in vain.
pub(crate) struct Ticket<'a> {
    /// The phase, from 0 on.
    pub phase: usize,
    /// The task's number in its phase.
    pub task: usize,
    schedule: &'a Schedule,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.schedule.failed.store(true, Ordering::Release);
        }
        self.schedule.done.fetch_add(1, Ordering::Release);
    }
}

impl Schedule {
    /// A run of phases with these numbers of tasks.
    pub(crate) fn new(phases: impl IntoIterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        for tasks in phases {
            starts.push(starts[starts.len() - 1] + tasks);
        }
        Self { starts, next: AtomicUsize::new(0), done: AtomicUsize::new(0), failed: AtomicBool::new(false) }
    }

    /// Calls `worker` on this thread and on up to `threads - 1` of rayon's, each with this schedule to draw from.
    ///
    /// One more of rayon's is asked, and whichever starts first takes part: where a thread last ran on the processor that this
    /// one now keeps busy, Linux may wake it there and leave it waiting for milliseconds, though another processor is idle.
    pub(crate) fn run(&self, threads: usize, worker: impl Fn(&Schedule) + Sync) {
        let total = self.starts[self.starts.len() - 1];
        let helpers = threads.min(total).saturating_sub(1);
        if helpers == 0 {
            return worker(self);
        }
        let started = AtomicUsize::new(0);
        rayon::in_place_scope(|scope| {
            for _ in 0..=helpers {
                scope.spawn(|_| {
                    if started.fetch_add(1, Ordering::Relaxed) < helpers {
                        worker(self);
                    }
                });
            }
            worker(self);
        });
    }

    /// The next task, once all that it depends on is done; `None` when there is no other, or one has panicked.
    /// (No closure over the tasks: one would not be compiled for the instructions of the function around it.)
    pub(crate) fn draw(&self) -> Option<Ticket<'_>> {
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        let phase = self.starts.partition_point(|&start| start <= ticket) - 1;
        let start = self.starts[phase];
        (phase + 1 < self.starts.len() && self.wait_for(start)).then(|| Ticket {
            phase,
            task: ticket - start,
            schedule: self,
        })
    }

    /// Waits until this many tasks are done; false if one of them panicked.
    fn wait_for(&self, tasks: usize) -> bool {
        let mut spins = 0u32;
        while self.done.load(Ordering::Acquire) < tasks {
            spins += 1;
            if spins < 2_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        !self.failed.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_after_the_phases_before_it() {
        for threads in [1, 2, 5] {
            let sizes = [3, 0, 17, 1, 40];
            let counts: Vec<AtomicUsize> = sizes.iter().map(|_| AtomicUsize::new(0)).collect();
            Schedule::new(sizes).run(threads, |schedule| {
                while let Some(Ticket { phase, task, .. }) = schedule.draw().as_ref() {
                    assert!(*task < sizes[*phase]);
                    for earlier in 0..*phase {
                        assert_eq!(counts[earlier].load(Ordering::Relaxed), sizes[earlier]);
                    }
                    counts[*phase].fetch_add(1, Ordering::Relaxed);
                }
            });
            let counts: Vec<usize> = counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
            assert_eq!(counts, sizes);
        }
    }

    #[test]
    fn no_more_threads_take_part_than_asked_for() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(6).build().unwrap();
        for threads in [1, 2, 4] {
            let (active, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            pool.install(|| {
                Schedule::new([200]).run(threads, |schedule| {
                    most.fetch_max(1 + active.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
                    while let Some(_ticket) = schedule.draw() {
                        std::thread::sleep(std::time::Duration::from_micros(50));
                    }
                })
            });
            assert!(most.into_inner() <= threads);
        }
    }

    #[test]
    fn runs_inside_a_pool_that_has_no_thread_to_spare() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let done = AtomicUsize::new(0);
        pool.install(|| {
            Schedule::new([4, 4]).run(8, |schedule| {
                while let Some(_ticket) = schedule.draw() {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        assert_eq!(done.into_inner(), 8);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller() {
        let outcome = std::panic::catch_unwind(|| {
            Schedule::new([8, 8]).run(3, |schedule| {
                while let Some(ticket) = schedule.draw() {
                    assert!((ticket.phase, ticket.task) != (0, 3));
                }
            })
        });
        assert!(outcome.is_err());
    }
}
