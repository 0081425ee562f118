// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that has the ring buffer take no more records while the module is
 * loaded, without touching the tracer, tracefs or xftrace's switch.
 *
 *	insmod xf_off.ko control=0xADDRESS
 *
 * The address is that of xftrace_control in /proc/kallsyms.
 */
#include <linux/module.h>
#include <linux/ring_buffer.h>
#include <linux/xftrace.h>

static unsigned long control;
module_param(control, ulong, 0400);

static struct trace_buffer *buffer;

static int __init xf_off_init(void)
{
	const struct xftrace_control *page = (void *)control;

	if (!control)
		return -EINVAL;
	buffer = (void *)(unsigned long)page->ring.buffer;
	ring_buffer_record_off(buffer);
	return 0;
}

static void __exit xf_off_exit(void)
{
	ring_buffer_record_on(buffer);
}

module_init(xf_off_init);
module_exit(xf_off_exit);
MODULE_DESCRIPTION("Stops Ftrace's ring buffer behind the switch's back, for xftrace's tests");
MODULE_LICENSE("GPL");
