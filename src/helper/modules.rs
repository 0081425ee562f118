//! Memory modules that are plugged in, or taken out, while the domain runs.
//!
//! The guest may use a new module within milliseconds, for its ring buffers
//! too. Pages that lie where no memory is known count as damaged, so the helper
//! looks often, and reads on with what there is.

use std::sync::Arc;

use super::attach::attach;
use super::engine::Engine;

impl Engine {
    /// Sees to modules that came or went.
    pub(super) fn attend_modules(&mut self) {
        let Some(now) = self.live.changed() else {
            return;
        };
        if now.modules == self.domain.modules {
            return;
        }
        match attach(&now, &self.config) {
            // Another start of the domain is another turn's.
            Ok(attached) if attached.qemu != self.attached.qemu => return,
            Ok(attached) => {
                self.attached.ram = attached.ram;
                self.attached.files = attached.files;
            }
            // libvirt may have written the XML before QEMU was done with it.
            Err(error) => {
                self.live.again();
                if let Some(again) = self.said.say() {
                    log::error!(
                        "the domain's memory modules have changed, and what the guest puts into \
                         a new one is not read: {error:#}; it is tried again{again}"
                    );
                }
                return;
            }
        }
        log::info!("the domain's memory is now {:?}", self.attached.files);
        if let Some(trace) = &mut self.trace {
            trace.goes_on_in(Arc::clone(&self.attached.ram));
        }
        self.domain.modules = now.modules;
    }
}
