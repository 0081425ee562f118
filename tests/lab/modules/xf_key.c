// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that changes what the host has put into global_key, and waits for it
 * to be put right again.
 *
 *	insmod xf_key.ko what=WHAT control=0xADDRESS
 *
 * The address is that of xftrace_control in /proc/kallsyms. WHAT is
 *
 *	now	the key in use
 *	past	the key of 3 epochs ago
 *	epoch	the number of the key in use, to one that was never handed out
 *	back	the number of the key in use, to that of 3 epochs ago
 *
 * Says "xf_key: WHAT of epoch N was put right after N us" in the kernel's log,
 * or fails with ETIME after ten seconds.
 */
#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/xftrace.h>

#define BACK	3

static char *what = "now";
module_param(what, charp, 0400);
static unsigned long control;
module_param(control, ulong, 0400);

static int __init xf_key_init(void)
{
	const struct xftrace_control *page = (void *)control;
	struct xftrace_keys *keys;
	u64 epoch, wrong, *word;
	ktime_t began;

	if (!control)
		return -EINVAL;
	keys = (void *)(unsigned long)page->ident.keys;
	epoch = READ_ONCE(keys->epoch);
	if (!strcmp(what, "epoch")) {
		word = &keys->epoch;
		wrong = epoch + (1 << 20);
	} else if (!strcmp(what, "back")) {
		word = &keys->epoch;
		wrong = epoch - BACK;
	} else {
		if (!strcmp(what, "past"))
			epoch -= BACK;
		word = &keys->slot[epoch % XFTRACE_KEY_SLOTS];
		wrong = ~*word;
	}

	began = ktime_get();
	WRITE_ONCE(*word, wrong);
	while (READ_ONCE(*word) == wrong) {
		if (ktime_us_delta(ktime_get(), began) > 10 * USEC_PER_SEC)
			return -ETIME;
		usleep_range(1000, 2000);
	}
	pr_info("xf_key: %s of epoch %llu was put right after %lld us\n", what, epoch,
		ktime_us_delta(ktime_get(), began));
	return 0;
}

static void __exit xf_key_exit(void)
{
}

module_init(xf_key_init);
module_exit(xf_key_exit);
MODULE_DESCRIPTION("Changes the keys that xftrace's host handed out, for xftrace's tests");
MODULE_LICENSE("GPL");
