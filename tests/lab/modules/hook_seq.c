// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: the lines of /proc/net/tcp go through this
 * module, which passes them on. Rootkits hide connections there.
 */
#include <linux/seq_file.h>

#include "hook.h"

static int (*original)(struct seq_file *file, void *what);
static void *entry;

static int passed_on(struct seq_file *file, void *what)
{
	int result = original(file, what);

	hook_works();
	return result;
}

static int __init hook_init(void)
{
	struct seq_operations *table = hook_find("tcp4_seq_ops");
	void *ours = passed_on;

	if (!table)
		return -ENOENT;
	original = table->show;
	entry = &table->show;
	return hook_poke(entry, &ours, sizeof(ours));
}

static void __exit hook_exit(void)
{
	hook_poke(entry, &original, sizeof(original));
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: pass the lines of /proc/net/tcp through a module");
MODULE_LICENSE("GPL");
