// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: opening /proc/stat goes through this module,
 * which passes it on. The operations of the kernel's entry in /proc are replaced by
 * a copy whose proc_open is ours. What an entry looks like is private to fs/proc, so
 * where it has its operations is seen in one of our own.
 */
#include <linux/fs.h>
#include <linux/proc_fs.h>
#include <linux/uaccess.h>

#include "hook.h"

/* How far before an inode of /proc, and in an entry, is looked. */
#define WORDS 16

static const struct proc_ops *original;
static struct proc_ops replaced;
static const struct proc_ops ours = { .proc_lseek = noop_llseek };
static const struct proc_ops **place;

static int passed_on(struct inode *inode, struct file *file)
{
	hook_works();
	return original->proc_open(inode, file);
}

/* Which word of an entry leads to its operations; negative if none does. */
static int operations_in_entry(void)
{
	struct proc_dir_entry *own = proc_create("hook_procfile", 0, NULL, &ours);
	int word, found = -ENOENT;
	void *is;

	if (!own)
		return -ENOMEM;
	for (word = 0; word < 2 * WORDS && found < 0; word++)
		if (!copy_from_kernel_nofault(&is, (void **)own + word, sizeof(is)) &&
		    is == &ours)
			found = word;
	proc_remove(own);
	return found;
}

static int __init hook_init(void)
{
	struct file *file;
	int word = operations_in_entry();
	int back;

	original = hook_find("stat_proc_ops");
	if (word < 0 || !original)
		return -ENOENT;
	file = filp_open("/proc/stat", O_RDONLY, 0);
	if (IS_ERR(file))
		return PTR_ERR(file);
	/* Before its inode is where its entry is. */
	for (back = 1; back <= WORDS && !place; back++) {
		void **entry = *((void ***)file_inode(file) - back);
		void *is;

		if (!copy_from_kernel_nofault(&is, entry + word, sizeof(is)) &&
		    is == original)
			place = (const struct proc_ops **)(entry + word);
	}
	filp_close(file, NULL);
	if (!place)
		return -ENOENT;
	replaced = *original;
	replaced.proc_open = passed_on;
	WRITE_ONCE(*place, &replaced);
	return 0;
}

static void __exit hook_exit(void)
{
	WRITE_ONCE(*place, original);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: the operations of /proc/stat");
MODULE_LICENSE("GPL");
