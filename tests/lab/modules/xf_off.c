// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that has the ring buffer, or one CPU's part of it, take no more
 * records while the module is loaded, without touching the tracer, tracefs or
 * xftrace's switch.
 *
 *	insmod xf_off.ko control=0xADDRESS [how=switch|count|cpu] [cpu=N]
 *
 * The address is that of xftrace_control in /proc/kallsyms. "switch" is the
 * default; "count" and "cpu" raise the count of those who want the buffer, or
 * that CPU's part, off.
 */
#include <linux/module.h>
#include <linux/ring_buffer.h>
#include <linux/string.h>
#include <linux/xftrace.h>

static unsigned long control;
module_param(control, ulong, 0400);
static char *how = "switch";
module_param(how, charp, 0400);
static int cpu;
module_param(cpu, int, 0400);

static struct trace_buffer *buffer;

static int __init xf_off_init(void)
{
	const struct xftrace_control *page = (void *)control;

	if (!control)
		return -EINVAL;
	buffer = (void *)(unsigned long)page->ring.buffer;
	if (!strcmp(how, "switch"))
		ring_buffer_record_off(buffer);
	else if (!strcmp(how, "count"))
		ring_buffer_record_disable(buffer);
	else if (!strcmp(how, "cpu"))
		ring_buffer_record_disable_cpu(buffer, cpu);
	else
		return -EINVAL;
	return 0;
}

static void __exit xf_off_exit(void)
{
	if (!strcmp(how, "switch"))
		ring_buffer_record_on(buffer);
	else if (!strcmp(how, "count"))
		ring_buffer_record_enable(buffer);
	else
		ring_buffer_record_enable_cpu(buffer, cpu);
}

module_init(xf_off_init);
module_exit(xf_off_exit);
MODULE_DESCRIPTION("Stops Ftrace's ring buffer behind the switch's back, for xftrace's tests");
MODULE_LICENSE("GPL");
